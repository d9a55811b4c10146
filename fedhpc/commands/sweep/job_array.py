"""An experiment as one job array: a task runs a cell.

Under SLURM task N runs cell N. PBS takes no lists of numbers, LSF counts from 1 and limits the highest number, and Flux
has no arrays: their tasks have the numbers from 1 on without gaps, and task N looks its cell up in a list.
"""

import argparse
import hashlib
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from fedhpc.commands.submit import check_asked, choose_scheduler, how_to_cancel, submit_file, write_job_file
from fedhpc.commands.submit.job_file import array_file, job_name
from fedhpc.commands.submit.request import read_request
from fedhpc.commands.sweep.experiment import DIGITS, Experiment
from fedhpc.commands.sweep.standing import CellLog, standing
from fedhpc.errors import ConfigError
from fedhpc.files import write_whole
from fedhpc.job.environment import SCHEDULERS
from fedhpc.job.job_files import COMMAND, SWEEP_FILE, TEMPLATES
from fedhpc.job.schedulers.base import JobEnvironment

RESOURCES = (
    *("nodes", "ranks", "ranks_per_node", "gpus_per_node", "cpus_per_task", "memory", "time", "account", "queue"),
)
"""Options of the command line that say what a job asks for."""


@dataclass(frozen=True, kw_only=True)
class JobArray:
    """The cells of an experiment that are not done, as an array, or one job each where there are no arrays."""

    experiment: Experiment
    scheduler: type[JobEnvironment]
    job_file: Path
    cells: Sequence[int]
    """Their numbers in the experiment."""
    at_once: int | None

    @property
    def is_numbered_by_cells(self) -> bool:
        """Whether task N runs cell N."""
        return self.scheduler is SCHEDULERS["slurm"]

    @property
    def jobs(self) -> int:
        """How many commands submit it."""
        return 1 if self.scheduler.has_arrays else len(self.cells)

    @property
    def tasks(self) -> str:
        """What `fedhpc sweep` is given for each task, a line each, in the shell's words."""
        lines = ([*self._arguments, "--cell", str(cell)] for cell in self.cells)
        return "".join(f"{shlex.join(line)}\n" for line in lines)

    @property
    def list_file(self) -> Path:
        """Where the tasks look their cells up; another list has another name, as arrays may wait for long."""
        digest = hashlib.sha256(self.tasks.encode(errors="surrogateescape")).hexdigest()[:DIGITS]
        return self.experiment.out / f"sweep-{digest}.tasks"

    def command(self, jobs: Sequence[str]) -> list[str]:
        """What submits it, or the job behind those with these ids."""
        if self.is_numbered_by_cells:
            array = f"--array={_ranges(self.cells)}" + (f"%{self.at_once}" if self.at_once else "")
            packaged = f"--export=ALL,FEDHPC={COMMAND},FEDHPC_TEMPLATES={TEMPLATES}"
            where = [] if Path("jobs/launch.sh").is_file() else [packaged]
            return ["sbatch", *where, array, str(self.job_file), *self._arguments]
        variables = [f"FEDHPC_ARRAY={self.list_file}", f"FEDHPC_JOB_FILE={self.job_file}"]
        command = self.scheduler.submission()
        command += self.scheduler.array_options(job_name(self.experiment.path), len(self.cells), self.at_once)
        if not self.scheduler.has_arrays:
            variables.append(f"FEDHPC_TASK={len(jobs) + 1}")
            if self.at_once and len(jobs) >= self.at_once:
                command.append(f"--dependency=afterany:{jobs[-self.at_once]}")
        return ["env", *variables, *command, *([] if self.scheduler.file_is_input else [str(self.job_file)])]

    def check_limit(self) -> None:
        """See that the scheduler takes so large an array.

        Raises:
            ConfigError: it says that it does not.
        """
        limit, largest = self.scheduler().array_limit(), len(self.cells)
        if self.is_numbered_by_cells:
            largest = max(self.cells) + 1
        if limit is not None and largest > limit[0]:
            raise ConfigError(
                f"{self.experiment.path}: --submit: an array of {largest} cells is needed, but {self.scheduler.name} "
                f"allows {limit[0]} here ({limit[1]}); leave cells out for now by exclude:, or make two experiments"
            )

    def show(self) -> str:
        """What submits it, for the user; JOB1, JOB2, ... stand for ids."""
        end = f" < {shlex.quote(str(self.job_file))}" if self.scheduler.file_is_input else ""
        ids = [f"JOB{number + 1}" for number in range(self.jobs)]
        return "\n".join(shlex.join(self.command(ids[:number])) + end for number in range(self.jobs))

    def submit(self, say: Callable[[str], None]) -> int:
        """Hand it to the scheduler; 0, or the exit status of the command that failed."""
        jobs: list[str] = []
        status = 0
        while len(jobs) < self.jobs and status == 0:
            command = self.command(jobs)
            say(shlex.join(command))
            status, said = submit_file(self.scheduler, command, self.job_file)
            say(said.rstrip("\n") if status == 0 else f"failed with {status}")
            if status == 0:
                jobs.append(self.scheduler.submitted(said))
        if jobs and not self.is_numbered_by_cells:
            say(how_to_cancel(self.scheduler, jobs))
        return status

    @property
    def _arguments(self) -> list[str]:
        return [str(self.experiment.path), "--expect", self.experiment.digest, *self.experiment.options]


def make_array(experiment: Experiment, given: argparse.Namespace) -> JobArray | None:
    """The array of all cells that are not done, and the files that it needs; None if all are done.

    Raises:
        ConfigError: the scheduler is not here, or does not know what is asked for; the job file is not here, cannot be
            written, or is another scheduler's; or the scheduler takes no array of that size.
    """
    key = choose_scheduler(given.scheduler, must_be_here=not given.dry_run, otherwise="leave --submit out")
    own = given.submit or (_packaged() if key == "slurm" and not asked_for(given) else None)
    if own:
        _check_own_file(key, Path(own), given)
    path = Path(own or experiment.out / f"sweep.{key}")
    cells = [number for number, cell in enumerate(experiment.cells) if not standing(experiment, cell).done]
    array = JobArray(experiment=experiment, scheduler=SCHEDULERS[key], job_file=path, cells=cells, at_once=given.jobs)
    if not own:
        check_asked(key, given)
        request = read_request(given, [cell.config for cell in experiment.cells])
    if not cells:
        return None
    array.check_limit()
    if not own:
        write_job_file(path, array_file(key, request, experiment.path, experiment.options, path))
    if not array.is_numbered_by_cells:
        experiment.make_folder()
        write_whole(array.list_file, array.tasks.encode(errors="surrogateescape"))
    return array


def asked_for(given: argparse.Namespace, *others: str) -> list[str]:
    """The options that say what a job asks for, or that have other names, of those that are given."""
    return [f"--{name.replace('_', '-')}" for name in (*RESOURCES, *others) if getattr(given, name) is not None]


def _packaged() -> str:
    return SWEEP_FILE if Path(SWEEP_FILE).is_file() else str(TEMPLATES / Path(SWEEP_FILE).name)


def _check_own_file(key: str, path: Path, given: argparse.Namespace) -> None:
    """See that a job file is there, is the scheduler's, and alone says what it asks for."""
    if asked := asked_for(given):
        raise ConfigError(f"{asked[0]}: --submit {path} says itself what it asks for; leave out one of them")
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        raise ConfigError(f"--submit {path}: no such file here; without FILE, fedhpc brings its own") from None
    found = [other for other, scheduler in SCHEDULERS.items() if re.search(rf"(?m)^{scheduler.directive}", text)]
    if found and key not in found:
        raise ConfigError(
            f"--submit {path}: is a job file of {SCHEDULERS[found[0]].name}, but {SCHEDULERS[key].name} is to take it; "
            f"choose by --scheduler {found[0]}, or leave FILE out"
        )


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
