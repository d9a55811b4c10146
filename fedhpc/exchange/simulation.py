"""The simulated clock: how long a round would take if each device had a link and a processor of its own.

It changes nothing but the time that is reported, so a report can set it anew from what a run's metrics say.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from fedhpc.config import Config
from fedhpc.config.sections import SimulationConfig
from fedhpc.exchange.encoding import Encoding, Upload
from fedhpc.exchange.exact_sum import SumSize
from fedhpc.exchange.messages import FLOAT
from fedhpc.exchange.secure.records import STEPS, device_bytes
from fedhpc.methods import Method
from fedhpc.seeding import generator

BITS_PER_BYTE = 8
MEGA = 1e6


@dataclass(frozen=True, kw_only=True)
class Load:
    """Bytes that a round asks of each of its devices."""

    down: int
    up: int
    trips: int = 1
    """How often a device receives something and answers."""
    up_first: int = 0
    """Of `up`, what a device sends before it may turn out to be absent."""

    @classmethod
    def of(cls, size: int, method: Method, encoding: Encoding) -> "Load":
        """Where so many floats are exchanged."""
        down = FLOAT.itemsize * size * (1 + len(method.sends))
        if not (among := encoding.masked_among):
            return cls(down=down, up=Upload.of(size, encoding, method).nbytes)
        extra, first, last = device_bytes(among)
        sums = SumSize(num_sums=encoding.num_sums, size=size, num_terms=among)
        return cls(down=down + extra, up=first + sums.nbytes + last, trips=STEPS, up_first=first)


def device_seconds(
    simulation: SimulationConfig, seed: int, device: int, *, steps: int, load: Load, measured: float = 0.0
) -> float:
    """A device's whole round, from the broadcast until its upload has arrived.

    Args:
        simulation: the clock.
        seed: the run's.
        device: i.
        steps: K_i.
        load: its bytes.
        measured: seconds a step, for a clock that gives none.
    """
    step = measured if simulation.step_seconds == "measured" else simulation.step_seconds
    seconds = 2 * load.trips * simulation.latency_s + steps * step * _slowness(seed, device, simulation.slowness)
    for count, rate in ((load.down, simulation.down_mbit), (load.up, simulation.up_mbit)):
        seconds += 0.0 if rate is None else BITS_PER_BYTE * count / (MEGA * rate)
    return seconds


@cache
def _slowness(seed: int, device: int, sigma: float) -> float:
    """How many times as long as the usual device this one takes for a step, in every round."""
    return float(generator(seed, purpose="slowness", device=device).lognormal(0.0, sigma))


def drops_out(config: Config, round_index: int, device: int) -> bool:
    """Whether a device that is sampled in a round does not take part, by `simulation.drop_out`."""
    probability = config.simulation.drop_out
    if not probability:
        return False
    return generator(config.seed, purpose="drop out", round_index=round_index, device=device).random() < probability


def round_seconds(simulation: SimulationConfig, seed: int, record: Mapping[str, Any]) -> float | None:
    """A round's time: that of its slowest device, and the server's own; None without a clock.

    Of a server that waits for no device, the time between two of its steps, by the run's own clock. A server with a
    deadline waits until then for a device that is absent, unless it has as many as it wants.

    Args:
        simulation: the clock; need not be the run's.
        seed: the run's.
        record: the round's metrics; None also if these are from before there was a clock.
    """
    if not simulation.has_clock or "device_steps" not in record:
        return None
    if "between_steps_s" in record:
        return float(record["between_steps_s"]) + float(record["seconds"]["server"])
    down, up = record["device_bytes"]
    load = Load(down=down, up=up, trips=record.get("device_trips", 1))
    absent = {entry["device"] for entry in record["absent"]}
    measured = record["seconds"]["step"]
    waited = [
        device_seconds(simulation, seed, device, steps=steps, load=load, measured=measured)
        for device, steps in zip(record["devices"], record["device_steps"], strict=True)
        if device not in absent
    ]
    wanted = int(len(record["devices"]) / (1 + simulation.over_selection) + 1e-9)
    if len(waited) < wanted and simulation.deadline_s is not None:
        waited = [simulation.deadline_s]
    return max(waited, default=0.0) + float(record["seconds"]["server"])
