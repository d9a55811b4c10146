"""What processes of one host share: memory of one of them, and doorbells that wake them.

Both are files without a name, which other processes of the same user open under their owner's process number. However
a process ends, nothing of them is left behind.
"""

import mmap
import os
import select
import time
from contextlib import suppress

import numpy as np

from fedhpc.exchange.messages import RecordType

NAME = "fedhpc"
ADDRESS = np.dtype([("file", "<i8"), ("nbytes", "<i8")])
TOKEN = RecordType(np.dtype(np.uint8), (16,))
"""Random bytes, by which a process knows that the memory it has attached is the owner's."""
UNIT_BYTES = 1 << 20
"""The memory grows by multiples of this: every process has to attach new memory, and fills it page by page."""
SHORTEST_POLL_S = 1e-3
"""The system counts the time of a poll in milliseconds."""


class HostMemory:
    """Memory of one process, as that process or another one sees it; empty until its owner reserves some."""

    def __init__(self, owner: int) -> None:
        self.owner = owner
        self.address = np.array([(-1, 0)], ADDRESS)
        """Where the memory now in use is, shape [1]: the owner's number of the file, and its size."""
        self._file = -1
        self._memory = np.empty(0, np.uint8)

    def reserve(self, nbytes: int) -> None:
        """Owner: see that it has at least so many bytes; what was in it may be lost."""
        if nbytes <= self._memory.size:
            return
        nbytes = -(-nbytes // UNIT_BYTES) * UNIT_BYTES
        file = os.memfd_create(NAME)
        os.ftruncate(file, nbytes)
        self._use(file, nbytes)
        self.address[0] = (file, nbytes)

    def attach(self, address: np.ndarray) -> None:
        """Another process: from now on, see what the owner has at this address.

        Raises:
            OSError: it cannot be seen from here.
            ValueError: there is something smaller.
        """
        if address == self.address:
            return
        number, nbytes = address[0].tolist()
        self._use(open_file_of(self.owner, number, os.O_RDWR, f"/memfd:{NAME} (deleted)"), nbytes)
        self.address[:] = address

    def write_token(self) -> np.ndarray:
        """Owner: write random bytes at the beginning of the memory; these bytes."""
        token = np.frombuffer(os.urandom(TOKEN.nbytes), np.uint8)
        self.reserve(TOKEN.nbytes)
        self.at(0, TOKEN, 1)[:] = token
        return token

    def try_attach(self, address: np.ndarray, token: np.ndarray) -> bool:
        """Another process: attach the owner's memory; whether it is there, and begins with this token."""
        try:
            self.attach(address)
        except (OSError, ValueError):
            return False
        return np.array_equal(self.at(0, TOKEN, 1)[0], token)

    def at(self, begin: int, record: RecordType, count: int) -> np.ndarray:
        """The ``count`` records that begin at this byte; no copy."""
        return np.ndarray((count, *record.shape), record.dtype, self._memory, begin)

    def close(self) -> None:
        """Let go of the memory; arrays that are still held stay valid."""
        if self._file >= 0:
            os.close(self._file)
        self._file, self._memory = -1, np.empty(0, np.uint8)

    def _use(self, file: int, nbytes: int) -> None:
        self.close()
        self._file, self._memory = file, np.frombuffer(mmap.mmap(file, nbytes), np.uint8)


class Doorbell:
    """Wakes its owner; any process that has opened it can ring."""

    def __init__(self) -> None:
        self._read, self.file = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.inode = os.fstat(self.file).st_ino
        """By which another process knows that it has opened this one."""
        self._poll = select.poll()
        self._poll.register(self._read, select.POLLIN)

    def wait(self, seconds: float) -> bool:
        """Sleep so long, or until somebody rings; whether anybody did."""
        if seconds < SHORTEST_POLL_S:
            time.sleep(seconds)
            return False
        if not self._poll.poll(1e3 * seconds):
            return False
        os.read(self._read, select.PIPE_BUF)
        return True


def open_doorbell(owner: int, file: int, inode: int) -> int:
    """The file by which this process can `ring` another one's doorbell.

    Raises:
        OSError: it cannot be opened from here.
    """
    return open_file_of(owner, file, os.O_WRONLY | os.O_NONBLOCK, f"pipe:[{inode}]")


def ring(doorbell: int) -> None:
    """Wake the owner of a doorbell, by its file."""
    with suppress(OSError):  # the owner has ended, or has not looked for so long that the pipe is full
        os.write(doorbell, b"!")


def open_file_of(owner: int, number: int, flags: int, name: str) -> int:
    """Open a file of another process by the number that it has there.

    Raises:
        OSError: it cannot be opened, or is not the file of this name.
    """
    path = f"/proc/{owner}/fd/{number}"
    if os.readlink(path) != name:
        raise OSError(f"{path} is another file")
    return os.open(path, flags | os.O_CLOEXEC)
