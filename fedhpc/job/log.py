"""What a run tells its user: log records, one metrics line per round, progress on the terminal."""

import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from fedhpc.files import naming
from fedhpc.job.console import when_lost

log = logging.getLogger("fedhpc")


class RunFiles:
    """The files of a run directory that the server writes."""

    def __init__(self, run_dir: str | Path) -> None:
        self.run_dir = Path(run_dir)
        self.config = self.run_dir / "config.yaml"
        self.metrics = self.run_dir / "metrics.jsonl"
        self.log = self.run_dir / "log.txt"

    def begin_anew(self) -> Path | None:
        """Put the lines of rounds aside that nobody goes on from; where they are now."""
        if not self.metrics.exists():
            return None
        names = (self.metrics.with_suffix(f".{number}.jsonl") for number in count(1))
        aside = next(name for name in names if not name.exists())
        return self.metrics.rename(aside)

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Add one line to metrics.jsonl, also behind one that an interruption cut short."""
        with naming(self.metrics), self.metrics.open("ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            file.write(json.dumps(record).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def read_metrics(self) -> list[dict[str, Any]]:
        """The rounds recorded, ascending; of a round repeated after an interruption the last line counts.

        What is no whole line of a round, as one that is being written or was cut short, is passed over.
        """
        records = {}
        for line in self.metrics.read_bytes().splitlines() if self.metrics.is_file() else ():
            with suppress(ValueError, RecursionError):
                record = json.loads(line)
                if is_record(record):
                    records[record["round"]] = record
        return [records[round_index] for round_index in sorted(records)]

    def rounds_recorded(self) -> set[int]:
        """The rounds that have a line."""
        return {record["round"] for record in self.read_metrics()}


LARGEST_NUMBER = 1e50
"""Of a run, even of its losses; what is computed of such numbers still is one."""
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
    return _are_numbers([*numbers, *(record.get("seconds", {}).get(key) for key in ("step", "server"))])


def _are_numbers(values: Iterable[Any]) -> bool:
    return all(isinstance(value, int | float) and abs(value) <= LARGEST_NUMBER for value in values)


def start_log(rank: int, size: int, host: str) -> None:
    """Records of this process go to stderr with time, rank and host; so does, once, that words are lost."""
    handler = _BesideProgressBar()
    handler.setFormatter(_formatter(rank, size, host))
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False
    when_lost(_say_lost)


def log_to_file(path: Path, rank: int, size: int, host: str) -> None:
    """Rank 0's records also go to the run's log.txt; of the other ranks only a fault's last words do."""
    handler = _LogFile(path)
    handler.setLevel(logging.INFO if rank == 0 else logging.CRITICAL)
    handler.setFormatter(_formatter(rank, size, host))
    log.addHandler(handler)


def _formatter(rank: int, size: int, host: str) -> logging.Formatter:
    return logging.Formatter(f"%(asctime)s %(levelname)s rank {rank}/{size} {host}: %(message)s")


def _say_lost(problem: OSError) -> None:
    log.warning("%s cannot be written: %s; the run goes on", problem.filename, problem.strerror)


class _BesideProgressBar(logging.Handler):
    """Writes to stderr without cutting a live progress bar in two."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)
        sys.stderr.flush()


class _LogFile(logging.Handler):
    """Adds to a file, which is made for the first record; what cannot be written is dropped."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.is_lost = False

    def emit(self, record: logging.LogRecord) -> None:
        line = f"{self.format(record)}\n".encode(errors="backslashreplace")
        try:
            with naming(self.path), self.path.open("ab", buffering=0) as file:
                file.write(line)
        except OSError as problem:
            if not self.is_lost:
                self.is_lost = True
                _say_lost(problem)


class Progress:
    """Rounds as they pass: a live bar on a terminal, one plain line per round elsewhere."""

    def __init__(
        self, earlier: Sequence[Mapping[str, Any]], first_round: int, rounds: int, stream: TextIO | None = None
    ) -> None:
        """Begin to show.

        Args:
            earlier: the metrics of the rounds before.
            first_round: the next one to be shown, counted from 0.
        """
        self.first_round, self.rounds = first_round, rounds
        self.stream = stream or sys.stdout
        self.start = time.monotonic()
        self.accuracy = "-"
        self.bytes = 0
        for record in earlier:
            self._note(record)
        self.bar = None
        if on_terminal(self.stream):
            # The pseudo-terminal that Open MPI gives a rank has no size, and on none tqdm would show nothing.
            columns, rows = shutil.get_terminal_size((100, 24))
            self.bar = tqdm(
                total=rounds, initial=first_round, desc="round", ncols=columns, nrows=rows, file=self.stream
            )

    def update(self, record: Mapping[str, Any]) -> None:
        """Show the round whose metrics these are."""
        done = record["round"] + 1
        self._note(record)
        loss = "-" if record["loss"] is None else f"{record['loss']:.3f}"
        facts = {"accuracy": self.accuracy, "loss": loss, "moved": human_bytes(self.bytes)}
        if self.bar is not None:
            self.bar.set_postfix(facts, refresh=False)
            self.bar.update()
            return
        elapsed = time.monotonic() - self.start
        remaining = elapsed / (done - self.first_round) * (self.rounds - done)
        text = "  ".join(f"{name} {value}" for name, value in facts.items())
        print(
            f"round {done}/{self.rounds}  {text}  ETA {tqdm.format_interval(remaining)}", file=self.stream, flush=True
        )

    def _note(self, record: Mapping[str, Any]) -> None:
        if record["accuracy"] is not None:
            self.accuracy = f"{record['accuracy']:.3f}"
        self.bytes += record["bytes"]

    def close(self) -> None:
        """End the bar's line."""
        if self.bar is not None:
            self.bar.close()


def on_terminal(stream: TextIO) -> bool:
    """Whether a person watches this stream.

    Open MPI gives every rank a pseudo-terminal of its own, so under mpirun the launcher's output decides.
    """
    if not stream.isatty():
        return False
    if "OMPI_COMM_WORLD_SIZE" not in os.environ:
        return True
    try:
        return os.readlink(f"/proc/{os.getppid()}/fd/1").startswith(("/dev/pts/", "/dev/tty"))
    except OSError:
        return False


def human_bytes(count: float) -> str:
    """1536 -> '1.5 kB'."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
