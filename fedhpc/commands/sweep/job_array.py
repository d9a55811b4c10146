"""An experiment as one SLURM array: task N runs cell N."""

import subprocess
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from fedhpc.commands.sweep.experiment import Experiment
from fedhpc.commands.sweep.standing import CellLog, standing
from fedhpc.errors import ConfigError
from fedhpc.job.job_files import COMMAND, SWEEP_FILE, TEMPLATES


def array_command(experiment: Experiment, job_file: str, at_once: int | None) -> list[str]:
    """The command that submits all cells which are not done; empty if there is none.

    Args:
        at_once: at most so many tasks run at once.

    Raises:
        ConfigError: there is no such job file here.
    """
    if job_file == SWEEP_FILE and not Path(job_file).is_file():
        job_file = str(TEMPLATES / Path(job_file).name)
    if not Path(job_file).is_file():
        raise ConfigError(f"--submit {job_file}: no such file here; without FILE, it is the one that fedhpc brings")
    numbers = [number for number, cell in enumerate(experiment.cells) if not standing(experiment, cell).done]
    array = f"--array={_ranges(numbers)}" + (f"%{at_once}" if at_once else "")
    where = [] if Path("jobs/launch.sh").is_file() else [f"--export=ALL,FEDHPC={COMMAND},FEDHPC_TEMPLATES={TEMPLATES}"]
    arguments = [str(experiment.path), "--expect", experiment.digest, *experiment.options]
    return ["sbatch", *where, array, job_file, *arguments] if numbers else []


def submit(command: Sequence[str]) -> int:
    """Hand an array to SLURM; sbatch's exit status.

    Raises:
        ConfigError: this machine has no sbatch.
    """
    try:
        return subprocess.run(command, check=False).returncode
    except FileNotFoundError:
        raise ConfigError(f"--submit: there is no {command[0]} on PATH; run it where jobs are submitted") from None


def task_arguments(experiment: Experiment, number: int, expected: str | None) -> str:
    """A cell's log, and what `fedhpc run` is given for it, one argument a line.

    Raises:
        ConfigError: there is no such cell, or the cells are not those that were submitted.
    """
    if expected not in (None, experiment.digest):
        raise ConfigError(
            f"--expect {expected}: the experiment has other cells or settings now ({experiment.digest}) than when it "
            "was submitted; cancel what is left of the array and submit it again"
        )
    if not 0 <= number < len(experiment.cells):
        raise ConfigError(f"--cell {number}: the cells have the numbers 0 to {len(experiment.cells) - 1}")
    cell = experiment.cells[number]
    return "\n".join([str(CellLog(experiment.out, cell).path), *cell.arguments])


def _ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> '0-2,5'."""
    runs = [[number for _, number in group] for _, group in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
