"""Whether this process runs in a container, and whether a launcher outside has started it."""

import os
from collections.abc import Sequence
from pathlib import Path

VARIABLES = {"APPTAINER_CONTAINER": "Apptainer", "SINGULARITY_CONTAINER": "Singularity", "container": "container"}
"""Set inside by the runtimes of that name; the last by podman and systemd, whose value is the runtime's name."""
FILES = {"/.dockerenv": "Docker", "/run/.containerenv": "podman", "/.singularity.d": "Apptainer"}
CGROUPS = {"docker": "Docker", "kubepods": "Kubernetes", "libpod": "podman"}
LAUNCHERS = ("mpirun", "mpiexec", "mpiexec.hydra", "prterun", "prted", "orterun", "orted", "hydra_pmi_proxy")
"""Names of processes, of which the system keeps 15 characters."""
SCHEDULERS = ("slurmstepd", "flux-shell")
"""What starts ranks for a scheduler, and processes that are none."""
NAME_LENGTH = 15
FIRST_NAMESPACE = "pid:[4026531836]"
"""That of the machine's own processes: PROC_PID_INIT_INO of Linux's include/linux/proc_ns.h."""


def container() -> str | None:
    """The kind of container around this process; None where nothing says so."""
    for name, kind in VARIABLES.items():
        if value := os.environ.get(name):
            return value if name == "container" else kind
    for path, kind in FILES.items():
        if os.path.exists(path):
            return kind
    try:
        groups = Path("/proc/self/cgroup").read_text()
    except OSError:
        return None
    return next((kind for mark, kind in CGROUPS.items() if mark in groups), None)


def container_words() -> str:
    """What to add to a message about ranks that do not find each other; nothing outside of a container."""
    if (kind := container()) is None:
        return ""
    return (
        f". This process runs in a container ({kind}): the launcher's variables (PMI_*, PMIX_*) and its files in "
        "/tmp must reach it, so no --cleanenv, --contain or --env-file, and the MPI inside must be of the launcher's "
        "kind; or start mpirun inside of the container"
    )


def launcher_above(others: Sequence[str] = ()) -> str | None:
    """The name of an MPI launcher, or of one of these others, that this process descends from, as far as it can see."""
    pid = os.getpid()
    while pid > 0:
        try:
            name, _, rest = Path(f"/proc/{pid}/stat").read_text(errors="replace").partition("(")[2].rpartition(")")
        except OSError:
            return None
        if name in [launcher[:NAME_LENGTH] for launcher in (*LAUNCHERS, *others)]:
            return name
        pid = int(rest.split()[1])
    return None


def is_cut_off() -> bool:
    """Whether this process, a rank, does not see what has started it: other ranks may have its process number."""
    try:
        if os.readlink("/proc/self/ns/pid") == FIRST_NAMESPACE:
            return False
    except OSError:
        return False
    return launcher_above(SCHEDULERS) is None
