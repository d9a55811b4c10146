"""No scheduler: this machine, for as long as one likes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedhpc.job.schedulers.base import JobEnvironment


@dataclass(frozen=True, eq=False)
class NoScheduler(JobEnvironment):
    """No batch job."""

    name: ClassVar[str] = "no scheduler"
    submit_command: ClassVar[str] = "bash"
    cancel_command: ClassVar[str] = "kill"

    @property
    def job_id(self) -> str | None:
        """None."""
        return None

    def seconds_left(self) -> float | None:
        """None: there is no limit."""
        return None

    def job_runs(self, job_id: str) -> bool | None:
        """None: nobody knows."""
        return None

    @classmethod
    def submission(cls, after: Sequence[str] = ()) -> list[str]:
        """The command that runs a job file here."""
        return ["bash"]
