"""Flux.

Manuals: flux-environment(7) (INITIAL PROGRAM ENVIRONMENT), flux-batch(1) (--dependency), flux-jobs(1) (JOB STATUS),
flux-job(1) (timeleft). The script of `flux batch` runs in an instance of its own: what knows the job is its parent.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedhpc.job.schedulers.base import MPIRUN_VARIABLES, JobEnvironment

ALIVE_STATES = ("RUN", "CLEANUP")
ENDED_STATES = ("DEPEND", "PRIORITY", "SCHED", "COMPLETED", "FAILED", "CANCELED", "TIMEOUT")
NO_LIMIT = 2**32 - 1
"""Seconds that `flux job timeleft` says of a job without a limit."""


@dataclass(frozen=True, eq=False)
class FluxEnvironment(JobEnvironment):
    """A job of Flux."""

    name: ClassVar[str] = "Flux"
    submit_command: ClassVar[str] = "flux"
    cancel_command: ClassVar[str] = "flux cancel"
    directive: ClassVar[str] = "(?i:# ?flux:)"
    has_arrays: ClassVar[bool] = False

    @property
    def job_id(self) -> str | None:
        """The batch job's; of what `flux run` or `flux submit` has started outside of one, its own."""
        return self.environ.get("FLUX_ENCLOSING_ID") or self.environ.get("FLUX_JOB_ID") or None

    @property
    def local_id(self) -> int:
        """This task's number among those that flux run started on this node."""
        return self._number("FLUX_TASK_LOCAL_ID", 0)

    @property
    def is_step(self) -> bool:
        """Whether flux run started this very process as one of its tasks."""
        return "FLUX_TASK_RANK" in self.environ and not any(name in self.environ for name in MPIRUN_VARIABLES)

    def launch_problem(self, size: int, has_mpi: bool) -> str | None:
        """Why the processes of this launch are not one job, for the user; None if they are."""
        tasks = self._number("FLUX_JOB_SIZE", 1)
        if self.is_step and tasks > size:
            return (
                f"flux run started {tasks} tasks, but MPI sees {size} of them: they do not find each other. Open MPI "
                "needs Flux's plug-in for PMIx (flux-pmix: flux run -o pmi=pmix); or start with mpirun"
            )
        return super().launch_problem(size, has_mpi)

    def seconds_left(self) -> float | None:
        """Seconds until the job's time limit; None without a limit or an answer."""
        answer = self.job_id and self._flux("job", "timeleft", self.job_id)
        return float(answer) if answer and answer.isdecimal() and int(answer) < NO_LIMIT else None

    def job_runs(self, job_id: str) -> bool | None:
        """Whether processes of a job may be alive; None without an answer, as of a job that Flux does not know."""
        status = self._flux("jobs", "--no-header", "--format={status}", job_id)
        return status in ALIVE_STATES if status in (*ALIVE_STATES, *ENDED_STATES) else None

    @classmethod
    def submission(cls, after: Sequence[str] = ()) -> list[str]:
        """The command that submits a job file; Flux cancels a job whose dependency cannot be met any more."""
        return ["flux", "batch", *(f"--dependency=afternotok:{job}" for job in after)]

    def _flux(self, *command: str) -> str | None:
        parent = ["--parent"] if self.environ.get("FLUX_ENCLOSING_ID") else []
        answer = self.ask("flux", *parent, *command)
        return answer[1].strip() if answer and answer[0] == 0 else None
