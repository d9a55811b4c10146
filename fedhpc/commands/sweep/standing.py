"""Where a cell stands, from the files in its run directory alone."""

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fedhpc.checkpoint.files import CheckpointFiles
from fedhpc.checkpoint.identity import (
    DATA,
    OLD_DATA,
    OLD_MODEL,
    data_identity,
    differences,
)
from fedhpc.commands.sweep.experiment import Cell, Experiment
from fedhpc.config.file import load_config
from fedhpc.errors import EXIT_STOPPED, ConfigError
from fedhpc.files import names_in, naming
from fedhpc.job.run_files import RunFiles, rounds_of
from fedhpc.methods.fedpeptao import OLD_RELEASED, is_old_released

HEAD, END = "=== ", "=== exit status "
ROUND = re.compile(r"round_(\d+)")
TAIL_LINES = 15
"""mpirun's own words about a rank that failed take ten."""


class CellLog:
    """What a cell's runs print, one after the other: a line before each, and a line with its exit status."""

    def __init__(self, out: Path, cell: Cell) -> None:
        self.path = out / "logs" / f"{cell.name}.log"

    def begin(self, command: str) -> None:
        """A run is about to write here."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._append(f"{HEAD}{command}")

    def end(self, status: int) -> None:
        """The run has ended."""
        self._append(f"{END}{status}")

    def last_status(self) -> int | None:
        """Exit status of the latest run, if it has ended."""
        return status_in(self._lines())

    def tail(self) -> list[str]:
        """The last lines that the latest run wrote."""
        lines: list[str] = []
        for line in self._lines():
            if line.startswith(HEAD):
                lines = lines if line.startswith(END) else []
            elif line.strip():
                lines.append(line)
        return lines[-TAIL_LINES:]

    def _append(self, line: str) -> None:
        """A line of its own: a run may have died within one."""
        if self.path.exists() and self.path.read_bytes()[-1:] not in (b"", b"\n"):
            line = f"\n{line}"
        with naming(self.path), self.path.open("a", encoding="utf-8", errors="surrogateescape") as file:
            file.write(f"{line}\n")

    def _lines(self) -> list[str]:
        return self.path.read_text(encoding="utf-8", errors="replace").splitlines() if self.path.exists() else []


def status_in(lines: Sequence[str]) -> int | None:
    """Exit status of the latest run in the lines of a cell's log, if it has ended."""
    found = re.fullmatch(rf"{END}(\d+)", (lines or [""])[-1])
    return int(found[1]) if found else None


@dataclass(frozen=True, kw_only=True)
class Standing:
    """How far a cell is."""

    completed: int
    """Rounds."""
    rounds: int
    """All that it has."""
    saved: bool
    """Whether the checkpoint of the last round is there; or none any more, and none that was never finished."""
    status: int | None
    """Exit status of its latest run in this sweep."""

    @property
    def done(self) -> bool:
        """Nothing is left to run."""
        return self.completed >= self.rounds and self.saved

    @property
    def failed(self) -> bool:
        """Its latest run did not end by itself, nor on request."""
        return not self.done and self.status not in (None, 0, EXIT_STOPPED)

    def __str__(self) -> str:
        if self.done:
            return "done"
        where = f"round {self.completed} of {self.rounds}" if self.completed else "not begun"
        return f"failed with exit status {self.status}, {where}" if self.failed else where


def standing(experiment: Experiment, cell: Cell) -> Standing:
    """Where a cell stands."""
    names, records = names_in(cell.run_dir / "checkpoints"), RunFiles(cell.run_dir).read_metrics()
    rounds = rounds_of(records, cell.config.federation.rounds, cell.config.privacy.epsilon)
    saved_after = [int(found[1]) for name in names if (found := ROUND.match(name))]
    return Standing(
        completed=len(records),
        rounds=rounds,
        saved=max(saved_after) >= rounds if saved_after else "partial" not in names,
        status=CellLog(experiment.out, cell).last_status(),
    )


def waiting(experiment: Experiment) -> list[Cell]:
    """The cells that are not done."""
    return [cell for cell in experiment.cells if not standing(experiment, cell).done]


def check_run_dirs(experiment: Experiment) -> None:
    """See that what is in the cells' run directories is theirs.

    Raises:
        ConfigError: some were written with another configuration.
    """
    problems = [problem for cell in experiment.cells if (problem := _foreign(cell))]
    if problems:
        raise ConfigError(
            f"{experiment.out}: {len(problems)} cell(s) were begun with another configuration; change it back, remove "
            "their folders to run them anew, or choose another --out:\n  " + "\n  ".join(problems)
        )


def _foreign(cell: Cell) -> str | None:
    """How a run directory with rounds in it differs from what the cell would write."""
    files = RunFiles(cell.run_dir)
    if not files.config.exists() or not files.rounds_recorded():
        return None
    try:
        theirs = load_config(files.config).identity()
    except ConfigError as error:
        return str(error)
    differing = differences(theirs, cell.config.identity(), "there")
    with suppress(OSError, KeyError, TypeError, ValueError):  # no checkpoint yet, or data that are not here any more
        differing += _data_differences(cell)
    return f"{cell.run_dir}: {'; '.join(differing)}" if differing else None


def _data_differences(cell: Cell) -> list[str]:
    """How a run, as its newest checkpoint has it, differs from one on the data in `data.path` now."""
    saved = CheckpointFiles(cell.run_dir).newest_readable(lambda file: json.loads(file.attrs["config"]))
    if saved is None:
        return []
    if is_old_released(saved):
        return [f"it {OLD_RELEASED}"]
    found = json.loads((Path(cell.config.data.path) / "description.json").read_text(encoding="utf-8"))
    if OLD_MODEL in saved:
        return differences({OLD_DATA: saved[OLD_DATA]}, {OLD_DATA: found["sha256"]}, "there")
    theirs = {key: value for key, value in saved.items() if key.startswith(DATA)}
    return differences(theirs, data_identity(found), "there")
