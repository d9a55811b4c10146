"""What a run asks of the batch job around it, and how a job file is submitted: the interface of all schedulers."""

import os
import re
import signal
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

ANSWER_S = 10.0
"""How long a scheduler may take to answer."""
MPIRUN_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "MPI_LOCALNRANKS", "MV2_COMM_WORLD_SIZE")
"""Set by mpirun (Open MPI, MPICH and Intel MPI, MVAPICH), never by srun alone."""
RANK_VARIABLES = (
    *("OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "SLURM_PROCID", "FLUX_TASK_RANK"),
)
GPU_VARIABLES = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
NO_GPU = ("", "-1", "NoDevFiles")


@dataclass(frozen=True, eq=False)
class JobEnvironment(ABC):
    """The batch job around this process, if there is one."""

    environ: Mapping[str, str] = field(default_factory=lambda: os.environ, repr=False)

    name: ClassVar[str]
    """Of the scheduler, for the user."""
    submit_command: ClassVar[str]
    """The program that takes a job; where it is, the scheduler is."""
    cancel_command: ClassVar[str]
    file_is_input: ClassVar[bool] = False
    """Whether the submit command reads the job file from its input, instead of taking its name."""
    directive: ClassVar[str] = "(?!)"
    """What begins a job file's lines to the scheduler, as a regular expression."""
    has_arrays: ClassVar[bool] = True
    """Whether one job can have many tasks."""
    gpu_variables: ClassVar[tuple[str, ...]] = GPU_VARIABLES
    """Set in jobs that were given GPUs."""

    @property
    @abstractmethod
    def job_id(self) -> str | None:
        """What no other job of the cluster is called, as the scheduler's commands take it; None without a job."""

    @property
    def title(self) -> str:
        """The job in words."""
        return "no batch job" if self.job_id is None else f"{self.name} job {self.job_id}"

    @property
    def cluster(self) -> str | None:
        """The cluster within which the job's number is unique."""
        return None

    @property
    def ranks_asked(self) -> int:
        """How many ranks the job was submitted for, 1 if it does not say."""
        return self._number("FEDHPC_RANKS", 1)

    @property
    def restarts(self) -> int:
        """How often the job, or one that it goes on from, was run before; its job file counts."""
        return self._number("FEDHPC_RESTARTS", 0)

    @property
    def local_id(self) -> int:
        """This task's number among those that the scheduler's own launcher started on this node."""
        return 0

    @property
    def is_step(self) -> bool:
        """Whether the scheduler's own launcher started this very process as one of its tasks."""
        return False

    @property
    def is_first_task(self) -> bool:
        """Whether this process speaks for all that were started together, although they do not find each other."""
        return next((self.environ[name] for name in RANK_VARIABLES if name in self.environ), "0") == "0"

    @property
    def gpus_allotted(self) -> bool:
        """Whether GPUs that this process sees are its to use: a job without GPUs may see those of other jobs."""
        granted = any(self.environ.get(name, "") not in NO_GPU for name in self.gpu_variables)
        return self.job_id is None or granted or self.gpus_asked > 0

    @property
    def gpus_asked(self) -> int:
        """GPUs of each node that `fedhpc submit` asked for."""
        return self._number("FEDHPC_GPUS_PER_NODE", 0)

    def gpu_index(self, local_rank: int, count: int) -> int:
        """Which of the visible GPUs this process takes.

        Args:
            local_rank: its number among the MPI ranks of this host.
            count: GPUs that it sees; one where the launcher gives every task its own.
        """
        return (self.local_id if self.is_step else local_rank) % max(count, 1)

    def gpu_problem(self, count: int) -> str | None:
        """Why this process has not the GPUs that its job asked for, for the user; None if it has.

        Args:
            count: GPUs that it sees.
        """
        if count >= self.gpus_asked or (count and self.is_step):
            return None
        visible = self.environ.get("CUDA_VISIBLE_DEVICES", "not set")
        return (
            f"FEDHPC_GPUS_PER_NODE: the job file asked for {self.gpus_asked} GPUs on each node, but {count} can be "
            f"used here, in {self.title} (CUDA_VISIBLE_DEVICES: {visible}): see how they are given, or ask for fewer"
        )

    def launch_problem(self, size: int, has_mpi: bool) -> str | None:
        """Why the processes of this launch are not one job, for the user; None if they are.

        Args:
            size: processes that MPI sees, 1 without MPI.
            has_mpi: whether the variables of an MPI launcher were found.
        """
        if has_mpi or self.job_id is None or size > 1 or self.ranks_asked <= 1:
            return None
        return (
            f"a single process was started in a job for {self.ranks_asked} ranks ({self.title}): start with mpirun; if "
            "one process is to do everything, ask for one rank"
        )

    def pmi_problem(self) -> str | None:
        """Why Intel MPI cannot start this task, for the user; None if nothing is known against it."""
        return None

    def mark(self, what: Literal["STARTED", "TRAINED", "FINISHED"]) -> None:
        """Make a file that tells the job script: the ranks have found each other; the run was stopped, but in
        training; it has ended, not been lost."""
        if name := self.environ.get(f"FEDHPC_{what}"):
            Path(name).touch()

    @abstractmethod
    def seconds_left(self) -> float | None:
        """Seconds until the job's time limit; None without a limit or an answer.

        It is counted by the wall clock of this moment: ask once, then count by the monotonic clock.
        """

    @abstractmethod
    def job_runs(self, job_id: str) -> bool | None:
        """Whether processes of a job of this cluster may be alive; None without an answer."""

    @classmethod
    @abstractmethod
    def submission(cls, after: Sequence[str] = ()) -> list[str]:
        """The command that submits a job file, which is its last argument, or its input.

        Args:
            after: earlier jobs of a chain: this one starts when all of them have ended without success, and is removed
                when one of them succeeds.
        """

    @classmethod
    def array_options(cls, name: str, tasks: int, at_once: int | None) -> list[str]:
        """What the submit command is told of an array whose tasks have the numbers 1 to `tasks`.

        Args:
            name: the job's.
            at_once: at most so many tasks run at once.
        """
        return []

    def array_limit(self) -> tuple[int, str] | None:
        """How many tasks an array may have, and the setting that says so; None if nobody tells."""
        return None

    @classmethod
    def submitted(cls, output: str) -> str:
        """The job's id in what the command says."""
        return output.strip()

    def ask(self, *command: str) -> tuple[int, str, str] | None:
        """What a command of the scheduler says: exit status, output, errors; None if it does not answer."""
        return run(command, self.environ)

    def _number(self, name: str, default: int) -> int:
        value = self.environ.get(name, "")
        return int(value) if re.fullmatch(r"[0-9]{1,18}", value) else default


def run(command: Sequence[str], environ: Mapping[str, str]) -> tuple[int, str, str] | None:
    """Exit status, output and errors of a command; None if there is no such command or it takes too long."""
    try:
        process = subprocess.Popen(
            command,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError:
        return None
    with process:
        try:
            out, err = process.communicate(timeout=ANSWER_S)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.returncode is None:
                # The whole group: the children of a wrapper would hold the pipes open.
                os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, out, err
