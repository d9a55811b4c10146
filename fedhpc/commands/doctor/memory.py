"""Memory: what the job allows, what ranks of a host share, and the folder in which the MPI shares it."""

import os
import resource
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedhpc.commands.doctor.finding import OK, PROBLEM, WARNING, Finding, by_host, rank_words
from fedhpc.commands.doctor.groups import memory_limit
from fedhpc.exchange import is_launched
from fedhpc.job.progress import human_bytes

SUBJECT = "memory"
SHARED_FOLDER = Path("/dev/shm")
NEEDED, NEEDED_PER_RANK = 16 << 20, 6 << 20
"""Bytes there: Open MPI 5 wants room for a segment of 16 MiB before it makes one, MPICH 5.0 fills 5.4 MB for each rank,
Intel MPI 2021 2.2 MB, both measured with 2 and 6 ranks."""
LEAST_BYTES = 2 << 30
"""Below this no rank with a small backbone and PyTorch gets far."""


def facts() -> dict[str, Any]:
    """Of this rank, before MPI is started."""
    return {
        "machine": _of_machine("MemTotal"),
        "available": _of_machine("MemAvailable"),
        "group": memory_limit(),
        "address_space": _limit(resource.RLIMIT_AS),
        "locked": _limit(resource.RLIMIT_MEMLOCK),
        "shared": shared_folder(),
    }


def shared_folder(needed: int = NEEDED) -> dict[str, Any]:
    """Room in /dev/shm, and what is said when a file of some size is put there."""
    try:
        found = os.statvfs(SHARED_FOLDER)
    except OSError as error:
        return {"error": error.strerror}
    room = {"size": found.f_blocks * found.f_frsize, "free": found.f_bavail * found.f_frsize}
    try:
        with tempfile.TemporaryFile(dir=SHARED_FOLDER) as file:
            os.posix_fallocate(file.fileno(), 0, needed)
    except OSError as error:
        return {**room, "error": error.strerror}
    return room


def check(facts: Mapping[int, Mapping[str, Any]]) -> Iterator[Finding]:
    """Host by host, what the ranks have.

    Args:
        facts: of each rank, with its host.
    """
    for host, ranks in by_host(facts):
        yield _limits(host, ranks, facts)
        yield _folder(host, ranks, facts[ranks[0]]["shared"])


def _limits(host: str, ranks: list[int], facts: Mapping[int, Mapping[str, Any]]) -> Finding:
    each = facts[ranks[0]]
    bounds = {"control group": each["group"], "ulimit -v, each process": each["address_space"]}
    words = [f"{human_bytes(each['available'])} of {human_bytes(each['machine'])} available"]
    words += [f"{name}: at most {human_bytes(bound)}" for name, bound in bounds.items() if bound is not None]
    if each["locked"] is not None:
        words.append(f"{human_bytes(each['locked'])} can be locked, which InfiniBand may need more of (ulimit -l)")
    usable = min([each["available"], *([each["group"]] if each["group"] else [])])
    if usable < LEAST_BYTES * len(ranks):
        advice = f"fedhpc plan says what {rank_words(ranks)} need; ask for more memory (--mem), or start fewer ranks"
        return Finding(SUBJECT, host, "; ".join(words), WARNING, advice)
    return Finding(SUBJECT, host, "; ".join(words))


def _folder(host: str, ranks: list[int], shared: Mapping[str, Any]) -> Finding:
    name, needed = f"{SHARED_FOLDER} of {host}", NEEDED + NEEDED_PER_RANK * len(ranks)
    room = f"{human_bytes(shared['free'])} of {human_bytes(shared['size'])} free" if "free" in shared else "not there"
    if "error" in shared:
        advice = (
            f"the MPI cannot share memory there ({shared['error']}): remove what earlier jobs left, or give a "
            "container a larger one (--shm-size, or bind the host's)"
        )
        return Finding(SUBJECT, name, room, PROBLEM if is_launched() else WARNING, advice)
    if shared["free"] < needed:
        advice = f"the MPI may need {human_bytes(needed)} for {len(ranks)} ranks: remove what earlier jobs left there"
        return Finding(SUBJECT, name, room, WARNING, advice)
    return Finding(SUBJECT, name, room, OK)


def check_sharing(
    places: Mapping[int, Mapping[str, Any]], hosts: Mapping[int, str], said: Mapping[int, str | None]
) -> Finding:
    """Whether the ranks of rank 0's host share its memory, as they do in a run.

    Args:
        places: of each rank, whether it is `near` rank 0.
        hosts: of each rank.
        said: what ranks that are near say against the memory; None if they see what rank 0 has written there.
    """
    here = [rank for rank, host in hosts.items() if host == hosts[0] and rank > 0]
    far = [rank for rank in here if rank in places and not places[rank]["near"]]
    bad = {rank: words for rank, words in said.items() if words is not None}
    name = "shared by ranks"
    if bad:
        rank, words = next(iter(bad.items()))
        advice = "ranks of one host cannot use each other's memory: tell the authors, with this report"
        return Finding(SUBJECT, name, f"rank {rank}: {words}", PROBLEM, advice)
    if far:
        value = f"{rank_words(far)} of {hosts[0]} do not share memory with rank 0: what they exchange is sent"
        advice = "start the ranks of a host in one container, as one user; it works as it is, but slower"
        return Finding(SUBJECT, name, value, WARNING, advice)
    others = len(set(hosts.values())) - 1
    value = f"{1 + len(here)} ranks of {hosts[0]} share memory" if here else f"no other rank on {hosts[0]}"
    return Finding(SUBJECT, name, value + (f"; {others} other hosts, to which is sent" if others else ""))


def _limit(kind: int) -> int | None:
    bound = resource.getrlimit(kind)[0]
    return None if bound == resource.RLIM_INFINITY else bound


def _of_machine(name: str) -> int:
    """A line of /proc/meminfo, in bytes."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith(f"{name}:"))) << 10
    return 0
