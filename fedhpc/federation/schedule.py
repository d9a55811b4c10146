"""How a device's learning rate changes over the rounds."""

from fedhpc.config import Config


def learning_rate(config: Config, round_index: int) -> float:
    """eta of a round; `linear` falls to zero over the whole run, in steps of one round."""
    if config.device.schedule == "constant":
        return config.device.learning_rate
    return config.device.learning_rate * (1 - round_index / config.federation.rounds)
