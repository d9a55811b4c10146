"""The order of events at a server that waits for no device, by the simulated clock: who is sent out, who arrives."""

import heapq
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fedhpc.config import Config
from fedhpc.exchange.simulation import drops_out
from fedhpc.federation.sampling import training_devices
from fedhpc.methods.in_flight import NOW, Arrivals, in_flight
from fedhpc.registry import METHODS
from fedhpc.seeding import generator


@dataclass(frozen=True, kw_only=True)
class Interval:
    """The time between two server steps."""

    sampled: list[int]
    """Devices that were sent P^t, in that order."""
    dropped_out: list[int]
    """Those of them that never answer; others were sent P^t at once in their places."""
    arrivals: Arrivals


def plan_interval(
    config: Config, index: int, numbers: Mapping[str, float], seconds_of: Callable[[int], float]
) -> Interval:
    """What happens from step t to step t + 1; the same whenever it is asked for.

    As many devices are at work all the time as the method wants. Whoever arrives is replaced, after all that arrive at
    the same moment, by a device drawn from those that are not at work and have no part in this interval yet: nobody
    trains twice from P^t. Where there is none left, fewer are at work until the next step. The step comes with the K-th
    arrival, or where nobody is at work any more.

    Args:
        config: the run's configuration.
        index: t.
        numbers: those of the server's state, with the changes under way.
        seconds_of: what a device takes from being sent P^t until its upload has arrived.
    """
    rng = generator(config.seed, purpose="sample devices", round_index=index)
    at_once, wanted = METHODS[config.server.method].concurrency(config), config.federation.devices_per_round
    flights, began = in_flight(numbers), numbers[NOW]
    under_way = [(flight.arrives, flight.sent, device) for device, flight in flights.items()]
    heapq.heapify(under_way)
    free = [device for device in training_devices(config) if device not in flights]
    sampled: list[int] = []
    dropped_out: list[int] = []
    arrives: dict[int, float] = {}
    taken: dict[int, int] = {}
    now = began
    while len(taken) < wanted:
        while free and (missing := at_once - len(under_way)):
            for device in rng.choice(free, size=min(missing, len(free)), replace=False).tolist():
                sampled.append(device)
                free.remove(device)
                if drops_out(config, index, device):
                    dropped_out.append(device)
                    continue
                arrives[device] = now + seconds_of(device)
                heapq.heappush(under_way, (arrives[device], index, device))
        if not under_way:
            break
        now = max(now, under_way[0][0])
        while under_way and under_way[0][0] <= now and len(taken) < wanted:
            _, sent, device = heapq.heappop(under_way)
            taken[device] = index - sent
    arrivals = Arrivals(began=began, now=now, taken=taken, arrives=arrives)
    return Interval(sampled=sampled, dropped_out=dropped_out, arrivals=arrivals)
