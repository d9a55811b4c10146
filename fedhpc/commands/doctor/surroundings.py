"""Home, caches, the model hub; the batch job, its time limit, and the clocks."""

import os
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fedhpc.commands.doctor.finding import OK, PROBLEM, WARNING, Finding, by_value, rank_words
from fedhpc.commands.doctor.limits import attempt
from fedhpc.job.schedulers.base import JobEnvironment

JOB, CACHES = "batch job", "home and caches"
HUB = "https://huggingface.co"
HUB_S, FOLDER_S, LIMIT_S = 3.0, 5.0, 15.0
TRUE = ("1", "ON", "YES", "TRUE")
"""Values of HF_HUB_OFFLINE that huggingface_hub takes for yes."""
SKEW_S = 2.0
SHORT_S = 600.0


def job(environment: JobEnvironment) -> Iterator[Finding]:
    """The scheduler's job around the first task, and the time that is left."""
    yield Finding(JOB, "job", environment.title)
    if environment.job_id is None:
        return
    left = attempt(LIMIT_S, lambda: {"seconds": environment.seconds_left()})
    if "error" in left or left["seconds"] is None:
        advice = "a run cannot stop itself before the time limit: set --signal=B:USR1@120 in the job file"
        yield Finding(JOB, "time limit", "none is seen", WARNING, advice)
    else:
        minutes = left["seconds"] / 60
        short = left["seconds"] < SHORT_S
        advice = "ask for more time: a run stops itself checkpoint.stop_before_end_s before the end"
        yield Finding(JOB, "time limit", f"{minutes:.0f} minutes left", *((WARNING, advice) if short else (OK, "")))


def check_clocks(offsets: Mapping[int, tuple[float, float]], hosts: Mapping[int, str]) -> Finding:
    """How far clocks are from that of rank 0.

    Args:
        offsets: of each other rank: seconds that its clock is ahead, and how far that may be wrong.
        hosts: of each rank.
    """
    name = "clocks"
    if not offsets:
        return Finding(JOB, name, "one host only")
    far = {rank: ahead for rank, (ahead, doubt) in offsets.items() if abs(ahead) - doubt > SKEW_S}
    if not far:
        worst = max(abs(ahead) for ahead, _ in offsets.values())
        return Finding(JOB, name, f"at most {1e3 * worst:.0f} ms apart")
    value = ", ".join(sorted({f"{hosts[rank]} {ahead:+.1f} s" for rank, ahead in far.items()}))
    advice = f"{rank_words(list(far))}: logs and time limits will be off; no lock and no result depends on it"
    return Finding(JOB, name, value, WARNING, advice)


def facts() -> dict[str, Any]:
    """Of this rank: what it can write."""
    home = os.path.expanduser("~")
    cache = os.environ.get("HF_HOME") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or f"{home}/.cache", "huggingface"
    )
    return {
        "home": [home, _writable(home)],
        "cache": [cache, _writable(cache)],
        "temporary": _temporary(),
    }


def check(facts: Mapping[int, Mapping[str, Any]]) -> Iterator[Finding]:
    """Home, caches and temporary files of all ranks."""
    needs = {
        "home": (
            WARNING,
            "nothing of a run is written there but a list of models, which makes starts faster: set XDG_CACHE_HOME",
        ),
        "cache": (
            WARNING,
            "models of the hub cannot be fetched: set HF_HOME to a folder that can be written and all hosts see",
        ),
        "temporary": (PROBLEM, "the MPI needs a folder for temporary files: set TMPDIR"),
    }
    for name, verdict in needs.items():
        values = {
            rank: each[name][0] + ("" if each[name][1] else ": cannot be written") for rank, each in facts.items()
        }
        bad = not all(each[name][1] for each in facts.values())
        shown = {"cache": "HF_HOME", "temporary": "temporary files"}.get(name, name)
        yield Finding(CACHES, shown, by_value(values), *(verdict if bad else (OK, "")))


def hub() -> Finding:
    """Whether the model hub can be reached from here; asked only where the user has not forbidden it."""
    url = os.environ.get("HF_ENDPOINT") or HUB
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in TRUE:
        return Finding(CACHES, "hub", "not asked: HF_HUB_OFFLINE is set; models and data come from folders and HF_HOME")
    found = attempt(HUB_S, lambda: _reach(url))
    if found is None:
        return Finding(CACHES, "hub", f"{url} answers")
    advice = "fetch models on the login node, with HF_HOME where all nodes see it, and set HF_HUB_OFFLINE=1 in the job"
    return Finding(CACHES, "hub", f"{url} is not reached: {found['error']}", WARNING, advice)


def _reach(url: str) -> None:
    parts = urlsplit(os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy") or url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    socket.create_connection((parts.hostname or "", port), timeout=HUB_S).close()


def _writable(folder: str) -> bool:
    """Whether files can be made in a folder, or in the nearest one above it that exists."""

    def look() -> None:
        existing = next(path for path in (Path(folder).absolute(), *Path(folder).absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=existing):
            pass

    return attempt(FOLDER_S, look) is None


def _temporary() -> list[Any]:
    """The folder for temporary files, and that files can be made in it, by which it is found."""
    found = attempt(FOLDER_S, lambda: {"folder": tempfile.gettempdir()})
    return [found.get("folder", "none"), "folder" in found]


def now() -> float:
    """The clock of day."""
    return time.time()
