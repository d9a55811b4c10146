"""`fedhpc sweep` on this machine: what there is to do, the runs, and what became of them."""

import argparse
import os
import shlex
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from fedhpc.commands.sweep.experiment import Cell, Experiment
from fedhpc.commands.sweep.exports import Export, find_exports
from fedhpc.commands.sweep.job_array import make_array
from fedhpc.commands.sweep.prepared import Part, find_parts, make
from fedhpc.commands.sweep.results import write_tables
from fedhpc.commands.sweep.runner import Runner
from fedhpc.commands.sweep.standing import CellLog, standing, waiting
from fedhpc.commands.sweep.stops import Stops
from fedhpc.errors import EXIT_FAILURE, EXIT_STOPPED, ConfigError
from fedhpc.job.environment import job_environment
from fedhpc.job.lock import RunLock
from fedhpc.job.schedulers.base import MPIRUN_VARIABLES

Failed = tuple[Experiment, Cell]


@dataclass(frozen=True, kw_only=True)
class Work:
    """An experiment, and what its cells that are not done need."""

    experiment: Experiment
    parts: Sequence[Part]
    exports: Sequence[Export]

    @property
    def unfinished(self) -> list[Experiment]:
        """The needed experiments of which cells are not done, while the experiment's own are not."""
        return [needed for needed in self.experiment.needs if waiting(needed)] if waiting(self.experiment) else []


def find_work(experiment: Experiment, sources: str | None) -> Work:
    """What there is to do; see `find_parts`.

    Raises:
        ConfigError: something that cells need is not there and cannot be made.
    """
    exports = find_exports(experiment)
    return Work(experiment=experiment, parts=find_parts(experiment, sources), exports=exports)


def overview(work: Work) -> str:
    """Everything there is to do, and where it stands: data, needed cells, exports, cells."""
    lines = []
    if work.parts:
        states = [
            ("there", "") if part.is_there else ("to prepare", f" from {part.recipe.source}") for part in work.parts
        ]
        rows = [(state, part.recipe.out + more) for part, (state, more) in zip(work.parts, states, strict=True)]
        lines += ["prepared data:", *_aligned(rows)]
    for needed in work.experiment.needs:
        lines += [f"cells of {needed.path}:", *_cell_lines(needed)]
    if work.exports:
        lines += ["exports:", *_aligned([(export.state, str(export.cell.export)) for export in work.exports])]
    if lines:
        lines.append(f"cells of {work.experiment.path}:")
    return "\n".join([*lines, *_cell_lines(work.experiment)])


def _cell_lines(experiment: Experiment) -> list[str]:
    """Every cell: its number, where it stands, its run directory."""
    rows = [(str(standing(experiment, cell)), str(cell.run_dir)) for cell in experiment.cells]
    width = len(str(len(rows) - 1))
    return [f"{number:>{width}}  {row}" for number, row in enumerate(_aligned(rows))]


def _aligned(rows: Sequence[tuple[str, str]]) -> list[str]:
    width = max(len(left) for left, _ in rows)
    return [f"{left:<{width}}  {right}" for left, right in rows]


def failed_cells(experiment: Experiment) -> list[Failed]:
    """Those whose latest run, whoever started it, failed."""
    return [(experiment, cell) for cell in experiment.cells if standing(experiment, cell).failed]


def conclude(experiment: Experiment, failed: Sequence[Failed]) -> int:
    """List the cells that failed, write the tables, say where they are; the exit status."""
    _list(failed)
    _say("tables: " + ", ".join(map(str, write_tables(experiment))))
    return EXIT_FAILURE if failed else 0


def _list(failed: Iterable[Failed]) -> None:
    for experiment, cell in failed:
        _say(f"FAILED: {cell.name}: {standing(experiment, cell)}")
        for line in CellLog(experiment.out, cell).tail():
            _say(f"    {line}")


class LocalSweep:
    """The work of a sweep, step by step; what is done already is left out, and a stop request ends it at any time."""

    def __init__(
        self, work: Work, *, launch: str | None, at_once: int | None, run: Callable[[Sequence[str]], int]
    ) -> None:
        """Get ready.

        Args:
            launch: what starts the ranks of a cell, instead of what the experiments say.
            at_once: so many cells; one unless given.
            run: the command line, for cells without a launcher: they are forks of this process.
        """
        self._work, self._launch, self._at_once, self._run = work, launch, at_once, run
        self._missing = [part for part in work.parts if not part.is_there]
        self._stops = Stops()
        self._failed: list[Failed] = []

    def run(self, load: Callable[[], None]) -> int:
        """Prepare data, run the needed cells, export them, run the cells, write the tables; the exit status.

        Args:
            load: imports what cells without a launcher need.
        """
        experiment = self._work.experiment
        waits, total = len(waiting(experiment)), len(experiment.cells)
        _say(f"{total} cells, {total - waits} of them done")
        status = 0
        with self._stops.listening():
            if waits:
                with _locked(experiment):
                    load()
                    status = self._in_turn(self._prepare, self._run_needed, self._export, self._run_own)
            if not status:
                status = self._stops.aside(lambda: conclude(experiment, self._failed))
        if status not in (0, EXIT_FAILURE):
            _list(self._failed)
        if status == EXIT_STOPPED:
            _say("stopped; the same command goes on from here")
        return status

    def submit(self, given: argparse.Namespace) -> int:
        """Prepare and export here, and hand the cells to a scheduler; those of needed experiments first, and alone.

        Args:
            given: the command line.
        """
        experiment, needs = self._work.experiment, self._work.unfinished
        arrays = [array for one in needs or [experiment] if (array := make_array(one, given))]
        for array in arrays if given.dry_run else ():
            _say(array.show())
        if not arrays:
            _say("all cells are done")
        if given.dry_run or not arrays:
            return 0
        with self._stops.listening():
            status = self._in_turn(self._prepare, *(() if needs else (self._export,)))
        if status:
            return status
        status = max(array.submit(_say) for array in arrays)
        if needs and not status:
            _say("these are needed first: when they have ended, run the same command again to go on")
        return status

    def _in_turn(self, *steps: Callable[[], int]) -> int:
        for step in steps:
            if status := EXIT_STOPPED if self._stops.requested else step():
                return status
        return 0

    def _prepare(self) -> int:
        for part in self._missing:
            _say(f"{part.key}: preparing {part.recipe.out} from {part.recipe.source}")
            if status := self._stops.aside(partial(_prepare, part)):
                return status
        return 0

    def _run_needed(self) -> int:
        for needed in self._work.unfinished:
            with _locked(needed):
                self._run_cells(needed)
        return 0

    def _export(self) -> int:
        for export in self._work.exports:
            if export.is_due:
                _say(f"exporting {export.cell.export}")
                if status := self._stops.aside(partial(_make, export)):
                    return status
        return 0

    def _run_own(self) -> int:
        self._run_cells(self._work.experiment)
        return 0

    def _run_cells(self, experiment: Experiment) -> None:
        launch = experiment.launch if self._launch is None else self._launch
        runner = Runner(experiment, launch, self._run, _say, self._stops)
        runner.run(waiting(experiment), self._at_once or 1)
        self._failed += [(experiment, cell) for cell in runner.failed]


def _prepare(part: Part) -> int:
    make(part)
    return 0


def _make(export: Export) -> int:
    export.make()
    return 0


@contextmanager
def _locked(experiment: Experiment) -> Iterator[None]:
    experiment.make_folder()
    with RunLock(experiment.out, job_environment(), key="out"):
        yield


def check_launch(launch: str | None) -> None:
    """See that there is what starts the ranks of a cell.

    Raises:
        ConfigError: there is not, or an mpirun has started the sweep itself.
    """
    if any(name in os.environ for name in MPIRUN_VARIABLES):
        raise ConfigError(
            "start `fedhpc sweep` without mpirun; it starts each cell's ranks itself: --launch 'mpirun -np 3'"
        )
    try:
        command = shlex.split(launch or "")
    except ValueError as error:
        raise ConfigError(f"launch: {launch}: {error}") from None
    if launch is not None and (not command or shutil.which(command[0]) is None):
        raise ConfigError(f"launch: {launch!r}: there is no such command on PATH")


def _say(text: str) -> None:
    print(text, flush=True)
