"""A round as the server knows it before it begins: who takes part, with how many steps and bytes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedhpc.config import Config
from fedhpc.exchange.base import Traffic
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
    """Those of them that drop out or would miss the deadline, and which of both."""
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
            "device_trips": self.load.trips,
            "examples": 0,
            "steps": 0,
            "loss": None,
            "accuracy": None,
            "accuracy_global": None,
            "device_learning_rate": self.learning_rate,
            "bytes": len(self.sampled) * (self.load.down + self.load.up_first)
            + len(self.present) * (self.load.up - self.load.up_first),
            "bytes_down": 0,
            "bytes_up": 0,
            "seconds": dict.fromkeys(("broadcast", "local", "gather", "server", *WITHIN_LOCAL), 0.0),
            "rejected": [],
            "update_norm": 0.0,
        }

    def measured(self, headers: np.ndarray, busy: Sequence[float], traffic: Traffic) -> dict[str, Any]:
        """The round's metrics with what its uploads took.

        Args:
            headers: of all uploads.
            busy: seconds of local work of each worker.
            traffic: of the round's requests; of a round that was interrupted, only of the rest.
        """
        local = max(traffic.seconds["local"], *busy)
        record = self.record() | {"bytes_down": traffic.bytes_down, "bytes_up": traffic.bytes_up}
        record["seconds"] |= {
            **traffic.seconds,
            "local": local,
            "idle": local - float(np.mean(busy)),
            "slowest_device": float(headers["seconds"].max(initial=0.0)),
            "step": float(np.median(headers["seconds"] / headers["num_steps"])),
        }
        return record


def plan_round(config: Config, partition: Partition, index: int, load: Load) -> Round:
    """Round t of a run; the same whenever it is asked for.

    Args:
        config: the run's configuration.
        partition: who has which examples.
        index: t.
        load: what the round asks of a device.
    """
    sampled, steps = sample_devices(config, index), round_steps(config, partition, index)
    reasons = {device: _reason_to_be_absent(config, index, device, steps[device], load) for device in sampled}
    absent = {device: reason for device, reason in reasons.items() if reason}
    eta = learning_rate(config, index)
    return Round(index=index, sampled=sampled, absent=absent, steps=steps, load=load, learning_rate=eta)


def _reason_to_be_absent(config: Config, index: int, device: int, steps: int, load: Load) -> str | None:
    simulation = config.simulation
    if simulation.drop_out:
        rng = generator(config.seed, purpose="drop out", round_index=index, device=device)
        if rng.random() < simulation.drop_out:
            return "dropped out"
    if simulation.deadline_s is not None:
        seconds = device_seconds(simulation, config.seed, device, steps=steps, load=load)
        if seconds > simulation.deadline_s:
            return f"late ({seconds:.3g} s)"
    return None
