"""PBS Professional and OpenPBS.

Manuals: qsub(1B) (ENVIRONMENT VARIABLES, -W depend, -J), qstat(1B) (job states, -f -F json), pbs_job_attributes(7B),
pbs_server_attributes(7B) (max_array_size), qrerun(1B), which only a manager or operator of PBS may call.
"""

import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from fedhpc.job.schedulers.base import JobEnvironment

ALIVE_STATES = "RESU"
"""Running, exiting, suspended by PBS or for a user: processes may be left."""
UNKNOWN_JOB = "Unknown Job Id"
START = "%a %b %d %H:%M:%S %Y"
"""How qstat writes `stime`, in local time."""


@dataclass(frozen=True, eq=False)
class PbsEnvironment(JobEnvironment):
    """A job of PBS."""

    name: ClassVar[str] = "PBS"
    submit_command: ClassVar[str] = "qsub"
    cancel_command: ClassVar[str] = "qdel"
    directive: ClassVar[str] = "#PBS"

    @property
    def job_id(self) -> str | None:
        """NUMBER.SERVER, of a subjob NUMBER[INDEX].SERVER."""
        return self.environ.get("PBS_JOBID") or None

    @property
    def cluster(self) -> str | None:
        """The server that has given the number."""
        return f"PBS {(self.job_id or '').partition('.')[2]}"

    @property
    def ranks_asked(self) -> int:
        """Those that its job file says; otherwise, PBS_NODEFILE has a line for each of `mpiprocs`."""
        try:
            lines = Path(self.environ.get("PBS_NODEFILE", "")).read_text(encoding="utf-8").split()
        except OSError:
            lines = []
        return self._number("FEDHPC_RANKS", max(len(lines), 1))

    def seconds_left(self) -> float | None:
        """The walltime less what has passed since the job was started; time in which it was suspended counts, too."""
        if self.job_id is None:
            return None
        job = self._qstat(self.job_id) or {}
        limit = re.fullmatch(r"(\d+):(\d\d):(\d\d)", str((job.get("Resource_List") or {}).get("walltime")))
        try:
            started = time.mktime(time.strptime(str(job.get("stime")), START))
        except ValueError:
            return None
        if limit is None:
            return None
        hours, minutes, seconds = map(int, limit.groups())
        return max(0.0, started + (hours * 60 + minutes) * 60 + seconds - time.time())

    def job_runs(self, job_id: str) -> bool | None:
        """Whether processes of a job may be alive; None without an answer."""
        job = self._qstat(job_id)
        return None if job is None else job.get("job_state", "F") in ALIVE_STATES

    @classmethod
    def submission(cls, after: Sequence[str] = ()) -> list[str]:
        """The command that submits a job file; PBS deletes a job whose dependency cannot be met any more."""
        return ["qsub", *(["-W", f"depend=afternotok:{':'.join(after)}"] if after else [])]

    @classmethod
    def array_options(cls, name: str, tasks: int, at_once: int | None) -> list[str]:
        """A range, of two at least; and what is handed on to a job of a sweep."""
        array = ["-J", f"1-{tasks}" + (f"%{at_once}" if at_once else "")] if tasks > 1 else []
        return [*array, "-v", "FEDHPC_ARRAY,FEDHPC_JOB_FILE"]

    def array_limit(self) -> tuple[int, str] | None:
        """The server's; a queue may have a lower one."""
        answer = self.ask("qstat", "-B", "-f", "-F", "json")
        found = re.search(r'"max_array_size":\s*(\d+)', answer[1] if answer else "")
        return (int(found[1]), "max_array_size") if found else None

    def _qstat(self, job_id: str) -> dict[str, Any] | None:
        """A job's attributes, none of one that PBS does not know; None if it does not answer."""
        answer = self.ask("qstat", "-x", "-f", "-F", "json", job_id)
        if answer is None:
            return None
        status, out, err = answer
        if status != 0:
            return {} if UNKNOWN_JOB in err else None
        try:
            (job,) = json.loads(out)["Jobs"].values()
            return dict(job)
        except (ValueError, KeyError, TypeError, AttributeError):
            return None
