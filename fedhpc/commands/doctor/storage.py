"""The file system of the run directory: what a run needs of it, between ranks and hosts, and how fast it is."""

import errno
import fcntl
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from fedhpc.commands.doctor.finding import OK, PROBLEM, WARNING, Finding, by_value, first_of_hosts, rank_words
from fedhpc.commands.doctor.limits import attempt
from fedhpc.exchange import Survey
from fedhpc.files import check_replaces, fsync
from fedhpc.job.progress import human_bytes

SUBJECT = "file system"
LIMIT_S = 20.0
"""For each operation; a file system that takes longer hangs."""
SEEN_S = 5.0
"""How long other hosts may take to see what rank 0 has written."""
TEST_BYTES, CHUNK = 64 << 20, 1 << 20
SPEED_S = 10.0
LATE_S = 0.5
SLOW = 20e6
LEAST_FREE = 1 << 30
GONE = {"tmpfs": "in memory", "ramfs": "in memory", "overlay": "of this container", "squashfs": "an image"}
"""File systems that are gone with the job, or cannot be written."""
NOT_SHARED = ("ext2", "ext3", "ext4", "xfs", "btrfs", *GONE)
QUOTA_S = 5.0


def examine(folder: str, survey: Survey, hosts: Mapping[int, str], *, is_asked_for: bool) -> Iterator[Finding]:
    """Rank 0: everything about one folder, with the help of the other ranks.

    Args:
        folder: the run directory, which need not be there yet.
        survey: the ranks.
        hosts: of each rank that answers.
        is_asked_for: whether the user has named it; the current folder need not be writable.
    """
    found = attempt(LIMIT_S, partial(standing, folder))
    if "error" in found:
        yield Finding(
            SUBJECT, "folder", f"{folder}: {found['error']}", PROBLEM, "tell the administrators, or choose another"
        )
        return
    existing, kind = found["existing"], found["kind"]
    yield _kind(folder, found, num_hosts=len(set(hosts.values())))
    yield _room(found)
    place = attempt(LIMIT_S, lambda: {"name": tempfile.mkdtemp(prefix=".fedhpc-doctor-", dir=existing)})
    if "error" in place:
        advice = f"choose a run_dir that can be written ({existing} is {kind})"
        yield Finding(SUBJECT, "writing", place["error"], PROBLEM if is_asked_for else WARNING, advice)
        return
    try:
        yield _replacing(place["name"])
        yield from _between_ranks(Path(place["name"]), survey, hosts)
        yield from _speed(Path(place["name"]))
    finally:
        attempt(LIMIT_S, partial(shutil.rmtree, place["name"], ignore_errors=True))
    yield from _quota()


def standing(folder: str) -> dict[str, Any]:
    """What is known of a folder without writing: the part of its path that exists, its file system, room."""
    existing = next(path for path in (Path(folder).absolute(), *Path(folder).absolute().parents) if path.exists())
    room = os.statvfs(existing)
    kind, source = mount_of(existing)
    return {
        "existing": str(existing),
        "kind": kind,
        "source": source,
        "free": room.f_bavail * room.f_frsize,
        "size": room.f_blocks * room.f_frsize,
        "files": room.f_favail if room.f_files else None,
    }


def mount_of(path: Path) -> tuple[str, str]:
    """Kind and source of the file system that a path is on."""
    best, found = -1, ("unknown", "unknown")
    real = Path(os.path.realpath(path))
    for line in Path("/proc/self/mountinfo").read_text(errors="replace").splitlines():
        before, _, after = line.partition(" - ")
        point = re.sub(r"\\(\d{3})", lambda found: chr(int(found[1], 8)), before.split()[4])  # as \040 for a space
        if real.is_relative_to(point) and len(point) >= best:
            best, found = len(point), tuple(after.split()[:2])  # type: ignore[assignment]
    return found


def _kind(folder: str, found: Mapping[str, Any], *, num_hosts: int) -> Finding:
    value = f"{folder}: {found['kind']}, {found['source']}"
    if found["kind"] in GONE:
        advice = f"what is here is {GONE[found['kind']]}: put run directories on a file system that outlasts the job"
        return Finding(SUBJECT, "folder", value, WARNING, advice)
    if num_hosts > 1 and found["kind"] in NOT_SHARED:
        return Finding(
            SUBJECT, "folder", value, WARNING, "a disk of one host, by its kind; runs need one that all hosts share"
        )
    return Finding(SUBJECT, "folder", value)


def _room(found: Mapping[str, Any]) -> Finding:
    files = "" if found["files"] is None else f", for {found['files']:,} files"
    value = f"{human_bytes(found['free'])} of {human_bytes(found['size'])} free{files}"
    if found["free"] < LEAST_FREE or (found["files"] is not None and found["files"] < 10_000):
        advice = "make room; checkpoint.keep and checkpoint.every reduce what a run writes"
        return Finding(SUBJECT, "room", value, WARNING, advice)
    return Finding(SUBJECT, "room", value)


def _replacing(place: str) -> Finding:
    said = attempt(LIMIT_S, lambda: check_replaces(Path(place)))
    if said is None:
        return Finding(SUBJECT, "fsync and rename", "files and folders take the place of others, whole")
    advice = "no checkpoint can be written here: choose a run_dir on another file system"
    return Finding(SUBJECT, "fsync and rename", said["error"], PROBLEM, advice)


def _between_ranks(place: Path, survey: Survey, hosts: Mapping[int, str]) -> Iterator[Finding]:
    """Locks, and whether ranks see what others have just written; of each host one rank, and one beside rank 0."""
    peers = list(first_of_hosts(hosts).values())
    mark = f"{time.time_ns()}"
    file = place / "mark"
    written = attempt(LIMIT_S, lambda: _put(file, mark))
    if written:
        yield Finding(SUBJECT, "writing", written["error"], PROBLEM, "choose a run_dir on another file system")
        return
    seen = survey.ask("see", LIMIT_S, file=str(file), text=mark)
    blind = [rank for rank, each in seen.items() if each.get("seen_s") is None]
    if blind:
        advice = "every host must see the same folder under the same path: choose a run_dir that all hosts share"
        where, said = ", ".join(sorted({hosts[rank] for rank in blind})), seen[blind[0]]["error"]
        value = f"{rank_words(blind)} ({where}) see another folder: {said}"
        yield Finding(SUBJECT, "seen by all ranks", value, PROBLEM, advice)
        peers = [rank for rank in peers if rank not in blind]
    else:
        yield Finding(SUBJECT, "seen by all ranks", _delay(seen) if seen else "one process only")
    yield from _locks(file, survey, peers, hosts)
    for name, change in (("append seen", partial(_append, file, mark)), ("rename seen", partial(_rename, file, mark))):
        changed = attempt(LIMIT_S, change)
        if "error" in changed:
            yield Finding(SUBJECT, name, changed["error"], PROBLEM, "choose a run_dir on another file system")
            continue
        late = survey.ask("see", LIMIT_S, peers, file=str(file), text=changed["text"])
        if unseen := [rank for rank, each in late.items() if each.get("seen_s") is None]:
            advice = "caches of the file system hide what others write: choose a run_dir on another"
            yield Finding(SUBJECT, name, f"not within {SEEN_S:g} s by {rank_words(unseen)}", PROBLEM, advice)
        elif late:
            yield Finding(SUBJECT, name, _delay(late))
    written = survey.ask("write", LIMIT_S, peers, folder=str(place))
    if failed := {rank: each["error"] for rank, each in written.items() if each}:
        advice = "all ranks write there: look at permissions and mounts of these hosts"
        yield Finding(SUBJECT, "written by other ranks", by_value(failed), PROBLEM, advice)


def _delay(seen: Mapping[int, Mapping[str, Any]]) -> str:
    worst = max(each["seen_s"] for each in seen.values())
    return "at once" if worst < LATE_S else f"after {worst:.1f} s"


def _locks(file: Path, survey: Survey, peers: list[int], hosts: Mapping[int, str]) -> Iterator[Finding]:
    """Whether others see that rank 0 has locked a file, as `RunLock` does."""
    with file.open("r+b") as held:
        said = attempt(LIMIT_S, lambda: fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB))
        if said is not None:
            advice = (
                "a run is still found by the counter in its lock file, and a dead one is waited for 35 s; mount with "
                "flock (Lustre), or choose another file system"
            )
            yield Finding(SUBJECT, "locks", said["error"], WARNING, advice)
            return
        answers = {0: attempt(LIMIT_S, partial(lock, str(file))), **survey.ask("lock", LIMIT_S, peers, file=str(file))}
    free = [rank for rank, answer in answers.items() if answer != {"held": True}]
    if not free:
        others = len({hosts[rank] for rank in answers} - {hosts[0]})
        yield Finding(SUBJECT, "locks", "hold" + (f" on all {1 + others} hosts" if others else ""))
        return
    value = f"{rank_words(free)} can lock what rank 0 has locked ({', '.join(sorted({hosts[rank] for rank in free}))})"
    advice = "locks do not reach these hosts: two runs in one directory are told apart by its counter only, within 35 s"
    yield Finding(SUBJECT, "locks", value, WARNING, advice)


def _speed(place: Path) -> Iterator[Finding]:
    file = place / "speed"
    for name, work in (("64 MB written, with fsync", write_speed), ("64 MB read back", read_speed)):
        found = attempt(SPEED_S + LIMIT_S, partial(_measured, work, file))
        if "error" in found:
            yield Finding(SUBJECT, name, found["error"], PROBLEM, "no room, a quota, or a file system in trouble")
            return
        speed = found["speed"]
        advice = "checkpoints will be slow: a larger checkpoint.every, a longer checkpoint.stop_before_end_s"
        yield Finding(SUBJECT, name, f"{speed / 1e6:.0f} MB/s", *((WARNING, advice) if speed < SLOW else (OK, "")))


def _measured(work: Callable[[Path], float], file: Path) -> dict[str, float]:
    return {"speed": work(file)}


def write_speed(file: Path) -> float:
    """Bytes per second of a file of 64 MiB until it is on disk; of a part of it where that takes long."""
    chunk = os.urandom(CHUNK)
    began, written = time.monotonic(), 0
    with file.open("wb", buffering=0) as target:
        while written < TEST_BYTES and time.monotonic() < began + SPEED_S:
            written += target.write(chunk)
            if written % (8 * CHUNK) == 0:  # otherwise the last fsync may wait for all of it
                os.fsync(target.fileno())
        os.fsync(target.fileno())
    return written / (time.monotonic() - began)


def read_speed(file: Path) -> float:
    """Bytes per second of the same file, from disk where the system lets go of its copy in memory."""
    read, began = 0, time.monotonic()
    with file.open("rb", buffering=0) as source:
        os.posix_fadvise(source.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while (data := source.read(CHUNK)) and time.monotonic() < began + SPEED_S:
            read += len(data)
    return read / (time.monotonic() - began)


def _quota() -> Iterator[Finding]:
    """What `quota` says, where there is such a program; it fails where a quota is used up."""
    if shutil.which("quota") is None:
        return
    found = attempt(
        QUOTA_S, lambda: subprocess.run(["quota", "-w"], capture_output=True, text=True, timeout=QUOTA_S, check=False)
    )
    if isinstance(found, dict) or not (found.returncode or found.stdout.strip()):
        return
    verdict = (WARNING, "a quota is used up: remove files") if found.returncode else (OK, "")
    yield Finding(SUBJECT, "quota", found.stdout.strip() or found.stderr.strip(), *verdict)


def _put(file: Path, text: str) -> None:
    file.write_text(text)
    fsync(file)


def _append(file: Path, mark: str) -> dict[str, str]:
    with file.open("a") as target:
        target.write("+")
    return {"text": f"{mark}+"}


def _rename(file: Path, mark: str) -> dict[str, str]:
    new = file.with_name("new")
    _put(new, f"{mark}!")
    os.replace(new, file)
    return {"text": f"{mark}!"}


def see(file: str, text: str) -> dict[str, Any]:
    """Another rank: after how many seconds a file has this text; none where it never has."""
    began, problem = time.monotonic(), ""
    while time.monotonic() < began + SEEN_S:
        try:
            os.listdir(os.path.dirname(file))  # as a run does; a network file system then asks its server
            if Path(file).read_text() == text:
                return {"seen_s": time.monotonic() - began}
        except OSError as error:
            problem = f"{error.strerror}"
        time.sleep(0.02)
    return {"seen_s": None, "error": problem or "an older text"}


def lock(file: str) -> dict[str, Any]:
    """Whether a file is locked by another opening of it."""
    with open(file, "r+b") as again:
        try:
            fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return {"held": True}
            raise
    return {"held": False}


def write(folder: str, rank: int) -> None:
    """Another rank: write a file of its own."""
    _put(Path(folder, f"rank-{rank}"), "x")
