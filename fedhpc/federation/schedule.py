"""How a device's learning rate changes over the rounds."""

import math

from fedhpc.config import Config


def learning_rate(config: Config, round_index: int) -> float:
    """eta of a round: it rises over the W rounds of `device.warmup`, then follows `device.schedule`."""
    device = config.device
    if round_index < device.warmup:
        return device.learning_rate * (round_index + 1) / device.warmup
    left = 1 - (round_index - device.warmup) / (config.federation.rounds - device.warmup)
    if device.schedule == "linear":
        return device.learning_rate * left
    if device.schedule == "cosine":  # (1 + cos(pi (1 - left))) / 2, which rounding would make zero in long runs
        return device.learning_rate * math.sin(math.pi / 2 * left) ** 2
    return device.learning_rate
