"""IBM Spectrum LSF.

Manuals: "Environment variables set for job execution" in the configuration reference; bsub (-w, -ti, -wa, -wt, -J),
bjobs (-o, -a, JOB STATUS), bparams and brequeue in the command reference, https://www.ibm.com/docs/en/spectrum-lsf/10.1.0
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fedhpc.job.schedulers.base import JobEnvironment

ALIVE_STATES = ("RUN", "SSUSP", "USUSP", "PROV")
ENDED_STATES = ("PEND", "PSUSP", "WAIT", "DONE", "EXIT")
"""No process of such a job is left. LSF has lost sight of those in others: UNKWN, ZOMBI."""
TIME_LEFT = re.compile(r"(\d+):(\d+) L")
"""Hours and minutes to the run limit; other letters mean an estimate."""


@dataclass(frozen=True, eq=False)
class LsfEnvironment(JobEnvironment):
    """A job of LSF."""

    name: ClassVar[str] = "LSF"
    submit_command: ClassVar[str] = "bsub"
    cancel_command: ClassVar[str] = "bkill"
    directive: ClassVar[str] = "#BSUB"
    file_is_input: ClassVar[bool] = True

    @property
    def job_id(self) -> str | None:
        """The number, of an element of a job array NUMBER[INDEX]; the index is 0 without an array."""
        number, index = self.environ.get("LSB_JOBID"), self._number("LSB_JOBINDEX", 0)
        return (f"{number}[{index}]" if index else number) or None

    @property
    def cluster(self) -> str | None:
        """The folder of the cluster's configuration."""
        return f"LSF {self.environ.get('LSF_ENVDIR', '')}"

    def seconds_left(self) -> float | None:
        """Seconds until the run limit, in whole minutes."""
        answer = self.job_id and self._bjobs(self.job_id, "time_left")
        found = TIME_LEFT.fullmatch(answer or "")
        return 60.0 * (60 * int(found[1]) + int(found[2])) if found else None

    def job_runs(self, job_id: str) -> bool | None:
        """Whether processes of a job may be alive; None without an answer, as of a job that LSF has forgotten."""
        state = self._bjobs(job_id, "stat")
        return state in ALIVE_STATES if state in (*ALIVE_STATES, *ENDED_STATES) else None

    @classmethod
    def submission(cls, after: Sequence[str] = ()) -> list[str]:
        """The command that submits a job file; `-ti` removes a job that cannot start any more."""
        return ["bsub", *(["-w", " && ".join(f"exit({job})" for job in after), "-ti"] if after else [])]

    @classmethod
    def array_options(cls, name: str, tasks: int, at_once: int | None) -> list[str]:
        """A name with indices, which count from 1."""
        return ["-J", f"{name}[1-{tasks}]" + (f"%{at_once}" if at_once else "")]

    def array_limit(self) -> tuple[int, str] | None:
        """The highest index that an element may have (lsb.params)."""
        answer = self.ask("bparams", "-a")
        found = re.search(r"\bMAX_JOB_ARRAY_SIZE\s*=\s*(\d+)", answer[1] if answer else "")
        return (int(found[1]), "MAX_JOB_ARRAY_SIZE") if found else None

    @classmethod
    def submitted(cls, output: str) -> str:
        """The number in `Job <7> is submitted to queue <normal>.`"""
        found = re.search(r"Job <(\d+)>", output)
        return found[1] if found else output.strip()

    def _bjobs(self, job_id: str, what: str) -> str | None:
        answer = self.ask("bjobs", "-a", "-noheader", "-o", what, job_id)
        return answer[1].strip() if answer and answer[0] == 0 else None
