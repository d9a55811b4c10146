"""The files of a run directory that the server writes, and the lines of metrics in one of them."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

from fedhpc.files import fsync, naming


class RunFiles:
    """The files of a run directory that the server writes."""

    def __init__(self, run_dir: str | Path) -> None:
        self.run_dir = Path(run_dir)
        self.config = self.run_dir / "config.yaml"
        self.metrics = self.run_dir / "metrics.jsonl"
        self.log = self.run_dir / "log.txt"
        self.generations = self.run_dir / "generations"
        self.trackers = self.run_dir / "trackers"

    def answers(self, round_index: int) -> Path:
        """The file of the answers of a round, counted from 0."""
        return self.generations / f"round_{round_index:06d}.jsonl"

    def begin_anew(self) -> Path | None:
        """Put aside what rounds have left that nobody goes on from; where their lines are now."""
        folders = self.generations, self.trackers
        for number in count(1):
            aside = self.metrics.with_suffix(f".{number}.jsonl"), *(path.with_suffix(f".{number}") for path in folders)
            if not any(path.exists() for path in aside):
                break
        for path, other in zip((self.metrics, *folders), aside, strict=True):
            if path.exists():
                path.rename(other)
        return aside[0] if aside[0].exists() else None

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Add one line to metrics.jsonl, also behind one that an interruption cut short; not yet forced to disk."""
        with naming(self.metrics), self.metrics.open("ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            file.write(json.dumps(record).encode() + b"\n")

    def force_metrics(self) -> None:
        """Force the lines of metrics.jsonl to disk."""
        with naming(self.metrics), suppress(FileNotFoundError):
            fsync(self.metrics)

    def read_metrics(self) -> list[dict[str, Any]]:
        """The rounds recorded, ascending; of a round repeated after an interruption the last line counts.

        What is no whole line of a round, as one that is being written or was cut short, is passed over.
        """
        return records_in(self.metrics.read_bytes())[0] if self.metrics.is_file() else []

    def rounds_recorded(self) -> set[int]:
        """The rounds that have a line."""
        return {record["round"] for record in self.read_metrics()}


def records_in(data: bytes) -> tuple[list[dict[str, Any]], int]:
    """What `RunFiles.read_metrics` gives, from the file's content, and how many lines were passed over."""
    records, passed_over = {}, 0
    for line in data.splitlines():
        passed_over += bool(line.strip())
        with suppress(ValueError, RecursionError):
            record = json.loads(line)
            if is_record(record):
                records[record["round"]] = record
                passed_over -= 1
    return [records[round_index] for round_index in sorted(records)], passed_over


SPENT = "spent_budget"
"""In the metrics of the round with which a run has spent its budget of privacy: that budget."""


def rounds_of(records: Sequence[Mapping[str, Any]], rounds: int, budget: float | None) -> int:
    """How many rounds a run has: as many as asked for, or those that its budget of privacy had room for.

    Args:
        records: of the rounds so far.
        rounds: that are asked for.
        budget: that it has now.
    """
    last = records[-1] if records else {}
    return int(last["round"]) + 1 if budget is not None and last.get(SPENT) == budget else rounds


LARGEST_NUMBER = 1e50
"""No number of a run is larger, not even a loss; what is computed from such numbers is still finite."""
TIMED = ("devices", "absent", "device_steps", "device_bytes")
"""What a simulated clock reads of a line; older runs have the devices alone."""


def is_record(value: Any) -> bool:
    """Whether this is a round's line of the metrics, as far as it is computed with."""
    if not isinstance(value, dict) or not isinstance(value.get("round"), int) or "accuracy" not in value:
        return False
    seconds, devices = value.get("seconds", {}), value.get("device_accuracy") or []
    if not isinstance(seconds, dict) or not isinstance(devices, list):
        return False
    if (value["accuracy"] is None) != (value.get("accuracy_global") is None):
        return False
    unknown = [value["accuracy"], value.get("accuracy_global"), value.get("loss"), *devices]
    numbers = [value["round"], value.get("bytes"), value.get("steps", 0), *seconds.values()]
    return _are_numbers([*numbers, *(number for number in unknown if number is not None)]) and _is_timed(value)


def _is_timed(record: Mapping[str, Any]) -> bool:
    """Whether a line can be computed with by a simulated clock, or is from before there was one."""
    devices, absent, steps, sizes = lists = [record.get(key, []) for key in TIMED]
    if not all(isinstance(found, list) for found in lists) or not all(isinstance(entry, dict) for entry in absent):
        return False
    if "device_steps" not in record:
        return True
    if not record.keys() >= set(TIMED) or len(devices) != len(steps) or len(sizes) != 2:
        return False
    numbers = [*devices, *steps, *sizes, *(entry.get("device") for entry in absent)]
    numbers += [record.get("between_steps_s", 0), record.get("device_trips", 1)]
    return _are_numbers([*numbers, *(record.get("seconds", {}).get(key) for key in ("step", "server"))])


def _are_numbers(values: Iterable[Any]) -> bool:
    return all(isinstance(value, int | float) and abs(value) <= LARGEST_NUMBER for value in values)
