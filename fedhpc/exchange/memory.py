"""What processes of one host share: memory of one of them, and bells that wake them.

Both are files without a name, which other processes of the same user open under their owner's process number. However
a process ends, nothing of them is left behind.
"""

import fcntl
import mmap
import os
import select
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import numpy as np

from fedhpc.exchange.messages import RecordType

NAME = "fedhpc"
ADDRESS = np.dtype([("file", "<i8"), ("nbytes", "<i8")])
TOKEN = RecordType(np.dtype(np.uint8), (16,))
"""Random bytes, by which a process knows that what it sees is the owner's memory."""
UNIT_BYTES = 1 << 20
"""Room grows by these: new memory has to be found by everyone and filled page by page."""
SHORTEST_POLL_S = 1e-3
"""The system counts the time of a poll in milliseconds."""


class HostMemory:
    """Memory of one process, as that process or another one sees it; empty until its owner makes room."""

    def __init__(self, owner: int) -> None:
        self.owner = owner
        self.address = np.array([(-1, 0)], ADDRESS)
        """Of the memory now in use, shape [1]: the owner's number of the file, and its size."""
        self._file = -1
        self._memory = np.empty(0, np.uint8)

    def make_room(self, nbytes: int) -> None:
        """Owner: see that it has at least so many bytes; what was in it may be lost."""
        if nbytes <= self._memory.size:
            return
        nbytes = -(-nbytes // UNIT_BYTES) * UNIT_BYTES
        file = os.memfd_create(NAME)
        os.ftruncate(file, nbytes)
        self._use(file, nbytes)
        self.address[0] = (file, nbytes)

    def look_at(self, address: np.ndarray) -> None:
        """Another process: from now on, see what the owner has there.

        Raises:
            OSError: it cannot be seen from here.
            ValueError: there is something smaller.
        """
        if address == self.address:
            return
        number, nbytes = address[0].tolist()
        self._use(open_of(self.owner, number, os.O_RDWR, f"/memfd:{NAME} (deleted)"), nbytes)
        self.address[:] = address

    def put_token(self) -> np.ndarray:
        """Owner: begin with random bytes; these."""
        token = np.frombuffer(os.urandom(TOKEN.nbytes), np.uint8)
        self.make_room(TOKEN.nbytes)
        self.at(0, TOKEN, 1)[:] = token
        return token

    def sees(self, address: np.ndarray, token: np.ndarray) -> bool:
        """Another process: whether the owner's memory is there, and begins with this token."""
        try:
            self.look_at(address)
        except (OSError, ValueError):
            return False
        return np.array_equal(self.at(0, TOKEN, 1)[0], token)

    def at(self, begin: int, record: RecordType, count: int) -> np.ndarray:
        """So many records that begin there; no copy."""
        return np.ndarray((count, *record.shape), record.dtype, self._memory, begin)

    @contextmanager
    def alone(self, begin: int, count: int) -> Iterator[None]:
        """Nobody else is inside with any of so many numbers from ``begin`` on."""
        fcntl.lockf(self._file, fcntl.LOCK_EX, count, begin)
        try:
            yield
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN, count, begin)

    def close(self) -> None:
        """Let go of it; what somebody still holds stays in place."""
        if self._file >= 0:
            os.close(self._file)
        self._file, self._memory = -1, np.empty(0, np.uint8)

    def _use(self, file: int, nbytes: int) -> None:
        self.close()
        self._file, self._memory = file, np.frombuffer(mmap.mmap(file, nbytes), np.uint8)


class Bell:
    """Wakes its owner from a nap."""

    def __init__(self) -> None:
        self._read, self.file = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.number = os.fstat(self.file).st_ino
        """By which another process knows it."""
        self._poll = select.poll()
        self._poll.register(self._read, select.POLLIN)

    def nap(self, seconds: float) -> bool:
        """Sleep so long, or until somebody rings; whether anybody did."""
        if seconds < SHORTEST_POLL_S:
            time.sleep(seconds)
            return False
        if not self._poll.poll(1e3 * seconds):
            return False
        os.read(self._read, select.PIPE_BUF)
        return True


def bell_of(owner: int, file: int, number: int) -> int:
    """A process's bell, to be rung from here.

    Raises:
        OSError: it cannot be.
    """
    return open_of(owner, file, os.O_WRONLY | os.O_NONBLOCK, f"pipe:[{number}]")


def ring(bell: int) -> None:
    """Wake its owner."""
    with suppress(OSError):  # who has ended, or has not listened for long
        os.write(bell, b"!")


def open_of(owner: int, number: int, flags: int, name: str) -> int:
    """A file of another process, if it is what we take it for."""
    path = f"/proc/{owner}/fd/{number}"
    if os.readlink(path) != name:
        raise OSError(f"{path} is another file")
    return os.open(path, flags | os.O_CLOEXEC)
