"""A run's starts and how each ended, and its warnings: what log.txt says of them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

LINE = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),\d{3} ([A-Z]+) rank (\d+)/(\d+) (\S+): (.*)")
"""See `fedhpc.job.log`. Other lines belong to the record before, as those of a traceback do."""
PROCESS = re.compile(r"this is process \d+, (.+)")
BEGAN = re.compile(r"((?:starting at|resuming after|resuming within) round \d+ of (\d+)): ")
DONE = re.compile(r"done after round \d+; ")
STOPPED = re.compile(r"stopped on request \((.*)\), [\d.]+ \w+ written; ")
LEVELS = ("WARNING", "ERROR", "CRITICAL")
WARNINGS = 5
"""So many of the last are kept."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """One start of a run, and its end."""

    at: str
    """By the clock of the server's host, as the other times here."""
    job: str | None
    """The batch job; None where an earlier version did not say it."""
    host: str
    ranks: int
    how: str = ""
    """From where it went on; empty until then."""
    rounds: int | None = None
    """All that it was to have."""
    ended: str | None = None
    end: str | None = None
    """`done`, `stopped` or `failed`; None as long as the log says nothing."""
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class Warned:
    """A record of the log that is a warning, or worse."""

    at: str
    rank: int
    level: str
    message: str


@dataclass(frozen=True, kw_only=True)
class History:
    """What log.txt says."""

    starts: Sequence[Start] = ()
    warnings: Sequence[Warned] = ()


def read_history(data: bytes) -> History:
    """The history in the content of a log."""
    starts: list[Start] = []
    warnings: list[Warned] = []
    for line in data.decode(errors="replace").splitlines():
        if (found := LINE.fullmatch(line)) is None:
            continue
        at, level, rank, size, host, message = found.groups()
        if level in LEVELS:
            warnings = [*warnings[1 - WARNINGS :], Warned(at=at, rank=int(rank), level=level, message=message)]
        begun = Start(at=at, job=None, host=host, ranks=int(size))
        last = starts[-1] if starts else begun
        if process := PROCESS.fullmatch(message):
            starts.append(replace(begun, job=process[1]))
        elif began := BEGAN.match(message):
            if not starts or last.how or last.end:
                starts.append(begun)
            starts[-1] = replace(starts[-1], how=began[1], rounds=int(began[2]))
        elif starts and last.end is None and (end := _end(level, int(rank), message)):
            starts[-1] = replace(last, ended=at, end=end[0], why=end[1])
    return History(starts=starts, warnings=warnings)


def _end(level: str, rank: int, message: str) -> tuple[str, str] | None:
    """How a start ended and why, if this record says it; of several ranks that failed the first one counts."""
    if level == "CRITICAL":
        return "failed", f"rank {rank}: {message.removesuffix('; ending all ranks')}"
    if DONE.match(message):
        return "done", ""
    stopped = STOPPED.match(message)
    return ("stopped", stopped[1]) if stopped else None
