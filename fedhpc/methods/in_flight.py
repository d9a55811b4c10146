"""Changes on their way to a server that waits for no device; between its steps they are a part of its state."""

from collections.abc import Mapping
from dataclasses import dataclass

NAME = "in_flight."
"""Begins the names of a change's vector and, with SENT, ARRIVES and COUNT behind the device, of its numbers."""
SENT, ARRIVES, COUNT = ".sent", ".arrives", ".count"
NOW = "now"
"""The simulated second of the latest server step."""


@dataclass(frozen=True, kw_only=True)
class Flight:
    """A change between the device that made it and the server."""

    sent: int
    """The round t in which the device was sent P^t."""
    arrives: float
    """Simulated seconds since the run began."""
    count: int
    """What it counts, by `server.weights`."""

    def numbers(self, device: int) -> dict[str, float]:
        """As they are kept in the state."""
        name = f"{NAME}{device}"
        return {name + SENT: self.sent, name + ARRIVES: self.arrives, name + COUNT: self.count}


@dataclass(frozen=True, kw_only=True)
class Arrivals:
    """What happens between two steps of a server that waits for no device."""

    began: float
    """The simulated second of the step before."""
    now: float
    """That of the step."""
    taken: Mapping[int, int]
    """Devices whose changes the step takes, in order of arrival -> staleness, the steps since they were sent P."""
    arrives: Mapping[int, float]
    """When the changes of those that are sent P^t arrive, in this step or later."""


def in_flight(numbers: Mapping[str, float]) -> dict[int, Flight]:
    """Device -> its change under way, from the numbers of a state."""
    devices = [int(name[len(NAME) : -len(SENT)]) for name in numbers if name.startswith(NAME) and name.endswith(SENT)]
    return {
        device: Flight(
            sent=int(numbers[f"{NAME}{device}{SENT}"]),
            arrives=numbers[f"{NAME}{device}{ARRIVES}"],
            count=int(numbers[f"{NAME}{device}{COUNT}"]),
        )
        for device in devices
    }
