"""One run at a time in a run directory.

A run holds flock on the file `lock`, and beats: it rewrites a counter in it. The kernel frees the lock of a dead
process, but some file systems have no flock, or none that reaches other hosts. A lock file that another run left is
therefore judged before it is taken over: by this machine's process table, by the scheduler, or by watching the
counter. No clock of day and no file time decides anything: `started` is for people.
"""

import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Self, get_type_hints

from fedhpc.errors import NOT_SUPPORTED, USERS_FAULT, ConfigError
from fedhpc.job.environment import machine_id, start_ticks
from fedhpc.job.schedulers.base import JobEnvironment

BEAT_S = 10.0
WATCH_S = 35.0
"""How long another run's counter must stand still: three beats, and the time to write one."""
SETTLE_S = 1.0
"""How long to look whether another run takes a left lock over at the same moment."""
PATIENCE = 10
"""How often a lock is tried again whose holder's job is over: that job's node may be slow to release it."""
LOOKS = 20
SEEN_S = 5.0
"""How long other hosts may take to see a new lock file."""
RECORD_BYTES = 1024
NO_FLOCK = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


@dataclass(frozen=True, kw_only=True)
class Owner:
    """The process that holds a lock, or held it."""

    title: str
    host: str
    pid: int
    start_ticks: int
    """When it started: the next process of the same number has another."""
    machine: str
    uid: int
    cluster: str | None
    job_id: str | None
    restarts: int
    started: str
    beats: int = 0

    @classmethod
    def this_process(cls, environment: JobEnvironment) -> Self:
        """The owner that this process would be."""
        return cls(
            title=environment.title,
            host=socket.gethostname(),
            pid=os.getpid(),
            start_ticks=start_ticks(os.getpid()) or 0,
            machine=machine_id(),
            uid=os.getuid(),
            cluster=environment.cluster,
            job_id=environment.job_id,
            restarts=environment.restarts,
            started=datetime.now().astimezone().isoformat(timespec="seconds"),
        )

    @classmethod
    def parse(cls, record: bytes) -> Self | None:
        """The owner that a lock file names, if it names one."""
        try:
            owner = cls(**json.loads(record))
        except (ValueError, TypeError, RecursionError):
            return None
        kinds = get_type_hints(cls).items()
        return owner if all(isinstance(getattr(owner, name), kind) for name, kind in kinds) else None

    def lives_here(self, machine: str) -> bool | None:
        """Whether this process is alive; None if it is another machine's, or another user's."""
        if (self.machine, self.uid) != (machine, os.getuid()):
            return None
        return start_ticks(self.pid) == self.start_ticks

    def write(self, descriptor: int) -> None:
        """Put on disk what `parse` reads, always of the same size: between two beats only the counter changes."""
        os.pwrite(descriptor, json.dumps(asdict(self)).encode().ljust(RECORD_BYTES - 1) + b"\n", 0)
        os.fsync(descriptor)


class RunLock:
    """The right to write in a run directory; a context manager."""

    def __init__(
        self,
        run_dir: str | Path,
        environment: JobEnvironment,
        progress: Callable[[], None] = lambda: None,
        *,
        key: str = "run_dir",
        beat_s: float = BEAT_S,
        watch_s: float = WATCH_S,
    ) -> None:
        self.path = Path(run_dir) / "lock"
        self._key = key
        """What names the folder, for the user."""
        self.notice: str | None = None
        """Whose lock was taken over, and why."""
        self.lost = False
        """Another run has taken the lock over, because this process gave no sign of life: it must not write again."""
        self._environment, self._beat_s, self._watch_s = environment, beat_s, watch_s
        self._progress = progress
        """Is called every now and then while another run's lock is watched."""
        self._descriptor: int | None = None
        os.register_at_fork(after_in_child=self._close)

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def acquire(self) -> None:
        """Take the lock, until `release` or the end of this process.

        Raises:
            ConfigError: another run has it, or it cannot be taken here.
        """
        self._me = Owner.this_process(self._environment)
        self._stop = threading.Event()
        self._patience = PATIENCE
        try:
            while self._descriptor is None:
                self._descriptor = self._try()
        except OSError as error:
            if error.errno not in (*USERS_FAULT, *NOT_SUPPORTED):
                raise
            raise ConfigError(f"{self._key}: {self.path} cannot be locked: {error.strerror}") from None
        self._thread = threading.Thread(target=self._beat, args=[self._descriptor], daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Give the lock back; without a lock, or in a forked child, nothing happens."""
        if self._descriptor is None:
            return
        self._stop.set()
        self._thread.join()
        with suppress(OSError):
            if self._is_ours(self._descriptor):
                self.path.unlink()
        self._close()

    def check(self) -> None:
        """Ask the file system whether this process may still write.

        Raises:
            RuntimeError: another run has taken the directory over, and may have ended since.
        """
        vanished = not self.path.parent.exists()  # which whoever writes there will say
        if self.lost or not (vanished or (self._descriptor is not None and self._is_ours(self._descriptor))):
            raise RuntimeError(f"another run has taken over {self.path.parent}, in the belief that this one was dead")

    def _is_ours(self, descriptor: int) -> bool:
        return self._in_place(descriptor) and not self._taken_over()

    def _try(self) -> int | None:
        """The lock file, ours; None if another process changed it meanwhile."""
        if (found := self._open()) is None:
            return None
        descriptor, is_new = found
        with ExitStack() as undo:
            undo.callback(os.close, descriptor)
            if not self._flock(descriptor):
                return None
            before = b"" if is_new else self._read()
            alive, reason = (False, "") if is_new else self._judge(before)
            now = self._read()
            if not self._in_place(descriptor) or (now != before and not alive):
                return None
            if alive:
                raise self._refusal(now, f", or remove {self.path} if that process is surely dead")
            os.ftruncate(descriptor, RECORD_BYTES)
            self._me.write(descriptor)
            if not is_new:
                time.sleep(SETTLE_S)  # without flock, several may take it over at once: who wrote last has it
                if self._taken_over():
                    raise self._refusal(self._read())
                self.notice = f"took over the lock that {_name(before)} left in {self.path.parent}: {reason}"
            undo.pop_all()
        return descriptor

    def _open(self) -> tuple[int, bool] | None:
        """The file and whether it is new; None if it vanished meanwhile."""
        with suppress(FileExistsError):
            return os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), True
        if self.path.is_symlink() or (self.path.exists() and not self.path.is_file()):
            raise ConfigError(f"{self._key}: {self.path} is in the way: it is not a plain file")
        with suppress(FileNotFoundError):
            return os.open(self.path, os.O_RDWR | os.O_NOFOLLOW), False
        return None

    def _flock(self, descriptor: int) -> bool:
        """Whether the file is still there to be locked: its owner removes it before letting go."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                if Owner.parse(record := self._read()) is None:
                    self._changes(record, 2 * SETTLE_S)  # it is locked, but not yet written
                if self._in_place(descriptor):
                    self._wait_or_refuse()
                return False
            if error.errno not in NO_FLOCK:
                raise
        return self._in_place(descriptor)

    def _wait_or_refuse(self) -> None:
        """Another process has the file locked: wait a while if the scheduler says that its job is over."""
        owner = Owner.parse(record := self._read())
        known = owner and self._by_scheduler(owner)
        if not known or known[0]:
            raise self._refusal(record) from None
        if not self._patience:
            raise TimeoutError(f"{_name(record)} is over, but its lock {self.path} is still held") from None
        self._patience -= 1
        for _ in range(LOOKS):
            self._pause(self._watch_s / LOOKS)

    def _judge(self, record: bytes) -> tuple[bool, str]:
        """Whether the owner of a left lock file may be alive, and if not, how we know."""
        owner, me = Owner.parse(record), self._me
        if owner is None:
            return self._changes(record, SETTLE_S), "it names no process"
        if (alive := owner.lives_here(me.machine)) is not None:
            return alive, "that process has ended"
        if known := self._by_scheduler(owner):
            return known
        return self._changes(record, self._watch_s), f"it gave no sign of life for {self._watch_s:g} s"

    def _by_scheduler(self, owner: Owner) -> tuple[bool, str] | None:
        """What `_judge` says where the scheduler knows it."""
        me = self._me
        if owner.job_id is not None and (owner.cluster, owner.uid) == (me.cluster, me.uid):
            if owner.job_id == me.job_id and owner.restarts != me.restarts:
                return False, "that job was requeued"
            if owner.job_id != me.job_id and (runs := self._environment.job_runs(owner.job_id)) is not None:
                return runs, "that job has ended"
        return None

    def _changes(self, record: bytes, seconds: float) -> bool:
        # Counted looks, not elapsed time: while this process or the file system stands still, no time passes.
        for _ in range(LOOKS):
            self._pause(seconds / LOOKS)
            if self._read() != record:
                return True
        return False

    def _pause(self, seconds: float) -> None:
        time.sleep(seconds)
        self._progress()

    def _refusal(self, record: bytes, remedy: str = "") -> ConfigError:
        return ConfigError(
            f"{self._key}: {self.path.parent} is in use by {_name(record)}; only one run at a time may write there: "
            f"wait for it, end it, or choose another {self._key}{remedy}"
        )

    def _beat(self, descriptor: int) -> None:
        beats = 0
        while not self._stop.wait(self._beat_s):
            beats += 1
            # The run itself will say what is wrong with its directory.
            with suppress(OSError):
                if self._taken_over():
                    self.lost = True
                    return
                replace(self._me, beats=beats).write(descriptor)

    def _taken_over(self) -> bool:
        owner = Owner.parse(self._read())
        return owner is not None and replace(owner, beats=0) != self._me

    def _read(self) -> bytes:
        # By a new descriptor each time: only then do network file systems ask the server.
        with suppress(OSError), self.path.open("rb", buffering=0) as file:
            return file.read(4 * RECORD_BYTES)
        return b""

    def _in_place(self, descriptor: int) -> bool:
        with suppress(FileNotFoundError):
            return os.path.samestat(self.path.lstat(), os.fstat(descriptor))
        return False

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def check_seen(run_dir: str | Path, host: str) -> str:
    """See, on another rank, the lock that rank 0 has taken; what it says of its owner, the same on every rank.

    Args:
        run_dir: the run directory as this rank knows it.
        host: this rank's, for messages.

    Raises:
        ConfigError: there is none, so that this host has another folder under this name.
    """
    path = Path(run_dir) / "lock"
    for _ in range(LOOKS):
        with suppress(OSError):
            os.listdir(run_dir)  # a network file system then forgets that the file was not there
            if owner := Owner.parse(path.read_bytes()):
                return repr(replace(owner, beats=0))
        time.sleep(SEEN_S / LOOKS)
    raise ConfigError(
        f"run_dir: {path}, which rank 0 has made, is not there on {host}: the hosts see different folders under this "
        "name; choose a run_dir on a file system that all hosts share"
    )


def _name(record: bytes) -> str:
    owner = Owner.parse(record)
    return "an unknown process" if owner is None else f"{owner.title}, process {owner.pid} on {owner.host}"
