"""status.json: what each rank of a run is doing, for whoever looks at the run's folder meanwhile.

It is there while a run uses the folder, as `lock` is, and after a run that was lost. No run depends on it.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

STATUS_FILE = "status.json"
LONGEST_S = 1e12
"""No run takes longer."""


@dataclass(frozen=True, kw_only=True)
class RankStatus:
    """One rank, as rank 0 knows it."""

    rank: int
    host: str
    doing: str
    for_s: float = 0.0
    """How long it has been at that: with this device, whatever its step; as seen every few seconds."""
    silent_s: float
    """Since it was last heard of; every rank sends a word every few seconds, between two steps."""

    @classmethod
    def of(cls, values: Any) -> Self:
        """The rank that an entry of the file is about."""
        return cls(
            rank=int(_seconds(values["rank"])),
            host=_text(values["host"]),
            doing=_text(values["doing"]),
            for_s=_seconds(values["for_s"]),
            silent_s=_seconds(values["silent_s"]),
        )


@dataclass(frozen=True, kw_only=True)
class Status:
    """What the file says. Seconds are up to the moment it was written, which the file's own time tells."""

    written: str
    """By the clock of rank 0's host, with its time zone; for people."""
    process: int
    """Rank 0's number, as in `lock`."""
    up_s: float
    """Since the ranks began to work."""
    stop: str
    """Why a stop was requested; empty: it was not."""
    stops_in_s: float | None
    """Until the run stops itself, before the job's time limit; None: it does not."""
    ranks: Sequence[RankStatus]

    @classmethod
    def parse(cls, data: bytes) -> Self | None:
        """What a file says, if it is a whole one; what a later version may add is passed over."""
        try:
            values = json.loads(data)
            status = cls(
                written=_text(values["written"]),
                process=int(_seconds(values["process"])),
                up_s=_seconds(values["up_s"]),
                stop=_text(values["stop"]),
                stops_in_s=None if values["stops_in_s"] is None else _seconds(values["stops_in_s"]),
                ranks=[RankStatus.of(entry) for entry in values["ranks"]],
            )
        except (ValueError, TypeError, KeyError, RecursionError):
            return None
        return status

    def packed(self) -> bytes:
        """What `parse` reads."""
        return json.dumps(asdict(self)).encode() + b"\n"


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(value)
    return value


def _seconds(value: Any) -> float:
    if not isinstance(value, int | float) or not abs(value) < LONGEST_S:
        raise TypeError(value)
    return float(value)
