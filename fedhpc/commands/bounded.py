"""Work that may go on for ever, take all memory or crash: done in a child process within bounds."""

import os
import resource
import signal
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from fedhpc.errors import CheckpointError, UserError

SAID, REFUSED, FAILED = b"s", b"r", b"f"
WAIT = 5
"""So many times its processor time a child may take, on a busy machine or a slow file system."""


def bounded(work: Callable[[], str], name: str, *, seconds: int, memory: int) -> str:
    """What ``work`` returns, from a fork of this process.

    Args:
        name: the file that is read, for messages.
        seconds: of processor time.
        memory: bytes beyond what this process has now.

    Raises:
        CheckpointError: what ``work`` raises; or it came to no end within these bounds.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        _live_for(work, name, writing, seconds, memory)
    os.close(writing)
    deadline = threading.Timer(WAIT * seconds, os.kill, (child, signal.SIGKILL))
    deadline.start()
    with open(reading, "rb") as stream:
        outcome, text = stream.read(1), stream.read().decode(errors="surrogateescape")
    deadline.cancel()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if outcome == SAID:
        return text
    if outcome == REFUSED:
        raise CheckpointError(text)
    if outcome == FAILED:
        raise RuntimeError(text)
    is_late = status in (-signal.SIGXCPU, -signal.SIGKILL)
    took = f"took more than {seconds} s" if is_late else "crashed the HDF5 library"
    raise CheckpointError(f"{name}: cannot be read as a checkpoint: it is damaged: reading it {took}")


def _live_for(work: Callable[[], str], name: str, writing: int, seconds: int, memory: int) -> NoReturn:
    """All that the child does."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # a crash has words of its own
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        for kind, bound in ((resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, now + memory)):
            hard = resource.getrlimit(kind)[1]
            resource.setrlimit(kind, (bound if hard == resource.RLIM_INFINITY else min(bound, hard), hard))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        try:
            outcome, text = SAID, work()
        except UserError as error:
            outcome, text = REFUSED, str(error)
        except MemoryError:
            outcome, text = REFUSED, f"{name}: cannot be read as a checkpoint: it takes more than {memory >> 20} MiB"
        except BaseException:
            outcome, text = FAILED, traceback.format_exc()
        with open(writing, "wb") as stream:
            stream.write(outcome + text.encode(errors="surrogateescape"))
    finally:
        os._exit(0)
