"""`fedhpc sweep` on this machine: what there is to do, the runs, and what became of them."""

import os
import shlex
import shutil
from collections.abc import Callable, Sequence

from fedhpc.errors import EXIT_FAILURE, EXIT_STOPPED, ConfigError
from fedhpc.jobenv import MPIRUN_VARIABLES, JobEnvironment
from fedhpc.lock import RunLock
from fedhpc.sweep.experiment import Cell, Experiment
from fedhpc.sweep.results import write_tables
from fedhpc.sweep.runner import Runner
from fedhpc.sweep.standing import CellLog, standing


def cell_list(experiment: Experiment) -> str:
    """Every cell: its number, where it stands, its run directory."""
    rows = [
        (str(number), str(standing(experiment, cell)), str(cell.run_dir))
        for number, cell in enumerate(experiment.cells)
    ]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(f"{number:>{widths[0]}}  {stands:<{widths[1]}}  {run_dir}" for number, stands, run_dir in rows)


def conclude(experiment: Experiment, failed: Sequence[Cell]) -> int:
    """List the cells that failed, write the tables, say where they are; the exit status."""
    _list(experiment, failed)
    _say("tables: " + ", ".join(map(str, write_tables(experiment))))
    return EXIT_FAILURE if failed else 0


def failed_cells(experiment: Experiment) -> list[Cell]:
    """Those whose latest run, whoever started it, failed."""
    return [cell for cell in experiment.cells if standing(experiment, cell).failed]


def run_here(
    experiment: Experiment,
    *,
    launch: str | None,
    at_once: int,
    run: Callable[[Sequence[str]], int],
    prepare: Callable[[], None],
) -> int:
    """Run the cells that are not done, write the tables; the exit status.

    Args:
        launch: what starts the ranks of a cell.
        run: the command line, for cells without a launcher: they are forks of this process.
        prepare: imports what such a cell needs.
    """
    waiting = [cell for cell in experiment.cells if not standing(experiment, cell).done]
    _say(f"{len(experiment.cells)} cells, {len(experiment.cells) - len(waiting)} of them done")
    runner = Runner(experiment, launch, run, _say)
    if waiting:
        experiment.make_folder()
        with runner.listening(), RunLock(experiment.out, JobEnvironment(), key="out"):
            if launch is None:
                prepare()
            runner.run(waiting, at_once)
    if runner.stopped:
        _list(experiment, runner.failed)
        _say("stopped; the same command goes on from here")
        return EXIT_STOPPED
    return conclude(experiment, runner.failed)


def _list(experiment: Experiment, failed: Sequence[Cell]) -> None:
    for cell in failed:
        _say(f"FAILED: {cell.name}: {standing(experiment, cell)}")
        for line in CellLog(experiment.out, cell).tail():
            _say(f"    {line}")


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
