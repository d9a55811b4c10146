"""The batch job that this process runs in, and the machine."""

import os
import uuid
from collections.abc import Mapping
from pathlib import Path

from fedhpc.job.schedulers.base import JobEnvironment
from fedhpc.job.schedulers.flux import FluxEnvironment
from fedhpc.job.schedulers.lsf import LsfEnvironment
from fedhpc.job.schedulers.none import NoScheduler
from fedhpc.job.schedulers.pbs import PbsEnvironment
from fedhpc.job.schedulers.slurm import SlurmEnvironment

SCHEDULERS: Mapping[str, type[JobEnvironment]] = {
    "flux": FluxEnvironment,
    "slurm": SlurmEnvironment,
    "pbs": PbsEnvironment,
    "lsf": LsfEnvironment,
    "none": NoScheduler,
}
"""In this order they are looked for, here and by launch.sh: Flux can run within a job of another one."""
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def job_environment(environ: Mapping[str, str] = os.environ) -> JobEnvironment:
    """That of the scheduler whose job this process belongs to.

    launch.sh says which; where it has not started the process, the variables do.
    """
    if (said := environ.get("FEDHPC_SCHEDULER", "")) in SCHEDULERS:
        return SCHEDULERS[said](environ)
    found = (scheduler(environ) for scheduler in SCHEDULERS.values())
    return next((job for job in found if job.job_id is not None), NoScheduler(environ))


def machine_id() -> str:
    """The boot of the kernel and the namespace that this process's number belongs to."""
    try:
        return f"{BOOT_ID.read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return uuid.uuid4().hex


def start_ticks(pid: int) -> int | None:
    """When a process of this machine started, in ticks since the boot; None if it is not alive."""
    try:
        # The name in parentheses may hold anything.
        state, *numbers = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return None if state in ("Z", "X") else int(numbers[18])
