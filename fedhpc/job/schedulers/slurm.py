"""SLURM: a batch job as properties over its environment (sbatch(1), srun(1), OUTPUT ENVIRONMENT VARIABLES), squeue(1).

Job scripts that submit the next job hand their own variables down: SLURM_ARRAY_JOB_ID, SLURM_ARRAY_TASK_ID,
SLURM_RESTART_COUNT and SLURM_NTASKS may be those of the submitting job. SLURM_JOB_ID is always this job's.
"""

import ctypes
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedhpc.job.schedulers.base import GPU_VARIABLES, MPIRUN_VARIABLES, JobEnvironment, run

FIRST_SPECIAL_STEP = 0xFFFFFFF0
"""Step numbers from here on are SLURM's own: the batch script, the shell of salloc."""
ENDED_STATES = (
    *("PENDING", "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "OUT_OF_MEMORY"),
    *("PREEMPTED", "REQUEUE_FED", "REQUEUE_HOLD", "REVOKED", "SPECIAL_EXIT", "TIMEOUT"),
)
"""No process of such a job is left; a requeued job is COMPLETING until then."""
LOST_STATE = "NODE_FAIL"
"""SLURM has lost sight of the job's processes."""
TIME_LEFT = re.compile(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)")


@dataclass(frozen=True, eq=False)
class SlurmEnvironment(JobEnvironment):
    """A job of SLURM."""

    name: ClassVar[str] = "SLURM"
    submit_command: ClassVar[str] = "sbatch"
    cancel_command: ClassVar[str] = "scancel"
    directive: ClassVar[str] = "#SBATCH"
    gpu_variables: ClassVar[tuple[str, ...]] = (*GPU_VARIABLES, "SLURM_JOB_GPUS", "SLURM_STEP_GPUS")

    @property
    def job_id(self) -> str | None:
        """The number that no other job has: of an array task its own, of a heterogeneous job the leader's."""
        return self.environ.get("SLURM_JOB_ID") or None

    @property
    def title(self) -> str:
        """The job in words, an array task with the number that squeue shows."""
        if self.job_id is None:
            return "no batch job"
        array, task = self.environ.get("SLURM_ARRAY_JOB_ID"), self.environ.get("SLURM_ARRAY_TASK_ID")
        return f"SLURM job {self.job_id}" + (f" (array task {array}_{task})" if array and task else "")

    @property
    def cluster(self) -> str | None:
        """The cluster within which the job's number is unique."""
        return self.environ.get("SLURM_CLUSTER_NAME") or None

    @property
    def restarts(self) -> int:
        """How often the job was requeued."""
        return self._number("SLURM_RESTART_COUNT", 0)

    @property
    def local_id(self) -> int:
        """This task's number among those that srun started on this node."""
        return self._number("SLURM_LOCALID", 0)

    @property
    def is_step(self) -> bool:
        """Whether srun started this very process as one of its tasks.

        On several nodes mpirun starts its daemons by srun, and its ranks inherit the variables of the daemons' step.
        """
        by_mpirun = any(name in self.environ for name in MPIRUN_VARIABLES)
        return not by_mpirun and 0 <= self._number("SLURM_STEP_ID", -1) < FIRST_SPECIAL_STEP

    @property
    def gpus_allotted(self) -> bool:
        """Whether GPUs that this process sees are its to use: a job without GPUs may see those of other jobs."""
        return super().gpus_allotted or self._number("SLURM_GPUS_ON_NODE", 0) > 0

    def launch_problem(self, size: int, has_mpi: bool) -> str | None:
        """Why the processes of this launch are not one job, for the user; None if they are.

        Args:
            size: processes that MPI sees, 1 without MPI.
            has_mpi: whether the variables of an MPI launcher were found.
        """
        if self.is_step:
            tasks = self._number("SLURM_STEP_NUM_TASKS", 1)
            if tasks <= size:
                return None
            return (
                f"srun started {tasks} tasks, but MPI sees {size} of them: they do not find each other. Start with a "
                "plug-in that srun and the MPI library both know (srun --mpi=pmix or srun --mpi=pmi2; srun --mpi=list "
                "names what there is; Intel MPI also looks for SLURM's libpmi2.so at I_MPI_PMI_LIBRARY), or with "
                "mpirun inside the allocation"
            )
        tasks = max(self._number("SLURM_NTASKS", 1), self._het_tasks())
        if has_mpi or self.job_id is None or size > 1 or tasks <= 1:
            return None
        return (
            f"a single process was started in an allocation of {tasks} tasks ({self.title}): start with srun or "
            "mpirun; if one process is to do everything, with srun --ntasks=1"
        )

    def pmi_problem(self) -> str | None:
        """Why Intel MPI cannot start this task of srun, for the user; None if nothing is known against it."""
        path = self.environ.get("I_MPI_PMI_LIBRARY")
        if not self.is_step or not path:
            return None
        try:
            ctypes.CDLL(path)
        except OSError as error:
            return (
                f"I_MPI_PMI_LIBRARY: {error}: Intel MPI under srun needs the libpmi2.so of this SLURM on every node. "
                "Give its path, leave it unset, or start with Intel's mpirun inside the allocation"
            )
        return None

    def seconds_left(self) -> float | None:
        """Seconds until the job's time limit; None without a limit or an answer.

        It is counted by the wall clock of this moment: ask once, then count by the monotonic clock.
        """
        if (end := self._number("SLURM_JOB_END_TIME", 0)) > 0:
            return max(0.0, end - time.time())
        if self.job_id is None or not (found := TIME_LEFT.fullmatch(self._squeue(self.job_id, "%L") or "")):
            return None
        days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
        return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)

    def job_runs(self, job_id: str) -> bool | None:
        """Whether processes of a job of this cluster may be alive; None without an answer."""
        state = self._squeue(job_id, "%T")
        return None if state in (None, LOST_STATE) else state not in ("", *ENDED_STATES)

    @classmethod
    def submission(cls, after: Sequence[str] = ()) -> list[str]:
        """The command that submits a job file; `afternotok` counts a job that SLURM removed as one without success."""
        chain = ["--kill-on-invalid-dep=yes", f"--dependency=afternotok:{':'.join(after)}"] if after else []
        return ["sbatch", "--parsable", *chain]

    def array_limit(self) -> tuple[int, str] | None:
        """One more than the highest number that a task may have (slurm.conf(5))."""
        answer = self.ask("scontrol", "show", "config")
        found = re.search(r"^MaxArraySize\s*=\s*(\d+)", answer[1] if answer else "", re.MULTILINE)
        return (int(found[1]), "MaxArraySize") if found else None

    @classmethod
    def submitted(cls, output: str) -> str:
        """The job's number, which a cluster's name may follow."""
        return output.strip().partition(";")[0]

    def _squeue(self, job_id: str, what: str) -> str | None:
        """What squeue shows of a job: "" of one it does not know, None if it does not answer."""
        # The user's own squeue settings could hide the job, or ask another cluster.
        environ = {k: v for k, v in self.environ.items() if not k.startswith("SQUEUE_") and k != "SLURM_CLUSTERS"}
        answer = run(["squeue", "-h", "-t", "all", "-j", job_id, "-o", f"%A {what}"], environ)
        if answer is None:
            return None
        status, out, err = answer
        if status != 0:
            return "" if "Invalid job id" in err else None
        # The number of an array's last task is also the array's: squeue then shows all its tasks.
        shown = dict(line.split(maxsplit=1) for line in out.splitlines() if len(line.split()) == 2)
        return shown.get(job_id) if out.strip() else ""

    def _het_tasks(self) -> int:
        names = [name for name in self.environ if re.fullmatch(r"SLURM_NTASKS_HET_GROUP_\d+", name)]
        return sum(self._number(name, 0) for name in names)
