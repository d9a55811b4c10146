"""A round as the server knows it before it begins: who takes part, with how many steps and bytes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedhpc.config import Config
from fedhpc.exchange.simulation import Load, device_seconds
from fedhpc.federation.partition import Partition
from fedhpc.federation.sampling import Packs, make_packs, round_steps, sample_devices
from fedhpc.federation.schedule import learning_rate
from fedhpc.seeding import generator

WITHIN_LOCAL = ("idle", "slowest_device", "step")
"""Seconds of a round that are a part of its local work, or the median of a step."""


@dataclass(frozen=True, kw_only=True)
class Round:
    """One round of a run."""

    index: int
    """t."""
    sampled: list[int]
    """S_t, in sampled order."""
    absent: dict[int, str]
    """Those of them that drop out, would miss the deadline or are not among the first, and which of these."""
    steps: Sequence[int]
    """K_i of every device."""
    load: Load
    learning_rate: float
    """eta."""

    @property
    def present(self) -> list[int]:
        """The sampled devices that take part, in sampled order."""
        return [device for device in self.sampled if device not in self.absent]

    def packs(self, pack: int) -> Packs:
        """The devices that take part, in packs of at least so many."""
        return make_packs(self.present, self.steps, pack)

    def record(self) -> dict[str, Any]:
        """The round's metrics as long as nothing has happened."""
        return {
            "round": self.index,
            "devices": self.sampled,
            "absent": [{"device": device, "reason": reason} for device, reason in self.absent.items()],
            "device_steps": [self.steps[device] for device in self.sampled],
            "device_bytes": [self.load.down, self.load.up],
            "examples": 0,
            "steps": 0,
            "loss": None,
            "accuracy": None,
            "accuracy_global": None,
            "device_learning_rate": self.learning_rate,
            "bytes": len(self.sampled) * self.load.down + len(self.present) * self.load.up,
            "bytes_down": 0,
            "bytes_up": 0,
            "seconds": dict.fromkeys(("broadcast", "local", "gather", "server", *WITHIN_LOCAL), 0.0),
            "rejected": [],
            "update_norm": 0.0,
        }


def plan_round(config: Config, partition: Partition, index: int, load: Load) -> Round:
    """Round t of a run; the same whenever it is asked for.

    Args:
        config: the run's configuration.
        partition: who has which examples.
        index: t.
        load: what the round asks of a device.
    """
    sampled, steps = sample_devices(config, index), round_steps(config, partition, index)
    absent = _absent(config, index, sampled, steps, load)
    eta = learning_rate(config, index)
    return Round(index=index, sampled=sampled, absent=absent, steps=steps, load=load, learning_rate=eta)


def _absent(config: Config, index: int, sampled: list[int], steps: Sequence[int], load: Load) -> dict[int, str]:
    """Who of the sampled devices does not take part, and why."""
    absent = {device: "dropped out" for device in sampled if _drops_out(config, index, device)}
    if not config.clock_decides:
        return absent
    seconds = {
        device: device_seconds(config.simulation, config.seed, device, steps=steps[device], load=load)
        for device in sampled
        if device not in absent
    }
    deadline, wanted = config.simulation.deadline_s, config.federation.devices_per_round
    in_time = [device for device in seconds if deadline is None or seconds[device] <= deadline]
    first = sorted(in_time, key=seconds.__getitem__)[:wanted]
    for device in seconds.keys() - first:
        others = f", not of the first {wanted}" if device in in_time else ""
        absent[device] = f"late ({seconds[device]:.3g} s{others})"
    return {device: absent[device] for device in sampled if device in absent}


def _drops_out(config: Config, index: int, device: int) -> bool:
    probability = config.simulation.drop_out
    if not probability:
        return False
    return generator(config.seed, purpose="drop out", round_index=index, device=device).random() < probability
