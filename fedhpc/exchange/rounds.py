"""A round as the server knows it before it begins: who takes part, with how many steps and bytes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from fedhpc.config import Config
from fedhpc.exchange.base import Traffic
from fedhpc.exchange.simulation import Load, device_seconds, drops_out
from fedhpc.exchange.timeline import plan_interval
from fedhpc.federation.partition import Partition
from fedhpc.federation.sampling import Packs, make_packs, round_steps, sample_devices
from fedhpc.federation.schedule import learning_rate
from fedhpc.methods.in_flight import Arrivals
from fedhpc.registry import METHODS

WITHIN_LOCAL = ("idle", "slowest_device", "step")
"""Seconds of a round that are a part of its local work, or the median of a step."""
DROPPED_OUT = "dropped out"
"""Why a device is absent that never answers."""


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
    arrivals: Arrivals | None = None
    """Of a server that waits for no device."""

    @property
    def present(self) -> list[int]:
        """The sampled devices that take part, in sampled order."""
        return [device for device in self.sampled if device not in self.absent]

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing for the server to step by."""
        return not self.present if self.arrivals is None else not self.arrivals.taken

    def packs(self, pack: int) -> Packs:
        """The devices that take part, in packs of at least so many."""
        return make_packs(self.present, self.steps, pack)

    def record(self) -> dict[str, Any]:
        """The round's metrics as long as nothing has happened."""
        num_uploads = len(self.present if self.arrivals is None else self.arrivals.taken)
        record = {
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
            + num_uploads * (self.load.up - self.load.up_first),
            "bytes_down": 0,
            "bytes_up": 0,
            "seconds": dict.fromkeys(("broadcast", "local", "gather", "server", *WITHIN_LOCAL), 0.0),
            "rejected": [],
            "update_norm": 0.0,
        }
        if self.arrivals is None:
            return record
        stale = [*self.arrivals.taken.values()]
        return record | {
            "taken": [*self.arrivals.taken],
            "staleness": {"mean": float(np.mean(stale)), "max": max(stale)} if stale else None,
            "between_steps_s": self.arrivals.now - self.arrivals.began,
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


def plan_round(
    config: Config,
    partition: Partition,
    index: int,
    load: Load,
    numbers: Mapping[str, float] = MappingProxyType({}),
) -> Round:
    """Round t of a run; the same whenever it is asked for.

    Args:
        config: the run's configuration.
        partition: who has which examples.
        index: t.
        load: what the round asks of a device.
        numbers: those of the server's state; a server that waits for no device has there what is under way.
    """
    steps, arrivals = round_steps(config, partition, index), None

    def seconds_of(device: int) -> float:
        return device_seconds(config.simulation, config.seed, device, steps=steps[device], load=load)

    if METHODS[config.server.method].concurrency(config):
        interval = plan_interval(config, index, numbers, seconds_of)
        sampled, arrivals = interval.sampled, interval.arrivals
        absent = dict.fromkeys(interval.dropped_out, DROPPED_OUT)
    else:
        sampled = sample_devices(config, index)
        absent = _absent(config, index, sampled, seconds_of)
    return Round(
        index=index,
        sampled=sampled,
        absent=absent,
        steps=steps,
        load=load,
        learning_rate=learning_rate(config, index),
        arrivals=arrivals,
    )


def _absent(config: Config, index: int, sampled: list[int], seconds_of: Callable[[int], float]) -> dict[int, str]:
    """Who of the sampled devices does not take part, and why."""
    absent = {device: DROPPED_OUT for device in sampled if drops_out(config, index, device)}
    if not config.clock_decides:
        return absent
    seconds = {device: seconds_of(device) for device in sampled if device not in absent}
    deadline, wanted = config.simulation.deadline_s, config.federation.devices_per_round
    in_time = [device for device in seconds if deadline is None or seconds[device] <= deadline]
    first = sorted(in_time, key=seconds.__getitem__)[:wanted]
    for device in seconds.keys() - first:
        others = f", not of the first {wanted}" if device in in_time else ""
        absent[device] = f"late ({seconds[device]:.3g} s{others})"
    return {device: absent[device] for device in sampled if device in absent}
