"""No check takes for ever: one that hangs in a thread is left there, one that hangs or ends its process is in a child.

The process that was started never touches MPI or the file system that is examined: a child does, and tells it line by
line what it is about to do and what it has found.
"""

import ctypes
import json
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from fedhpc.commands.doctor.finding import Finding
from fedhpc.errors import EXIT_FAILURE, first_line

SLACK_S = 2.0
END_S = 1.0
TERMINATED = "ended by SIGTERM"
STATES = {
    "T": "; the process was stopped",
    "D": "; the process hangs in the kernel, as in a file system that does not answer",
}
"""By the letter for it in /proc."""
PR_SET_PDEATHSIG = 1


class Tell:
    """The child's end: what it does, and what it has found."""

    def __init__(self, writing: int) -> None:
        self._writing = writing

    def doing(self, what: str, limit_s: float) -> None:
        """Begin with something that takes at most so long."""
        self._write({"doing": what, "limit_s": limit_s})

    def found(self, findings: Iterable[Finding]) -> None:
        """Report, one after the other as they are made."""
        for finding in findings:
            self._write({"finding": asdict(finding)})

    def place(self, **ranks: Any) -> None:
        """Say which ranks and hosts there are."""
        self._write({"place": ranks})

    def end(self) -> None:
        """Say that all is done."""
        self._write({"end": True})

    def _write(self, message: dict[str, Any]) -> None:
        data = json.dumps(message).encode() + b"\n"
        while data:
            data = data[os.write(self._writing, data) :]


@contextmanager
def supervise(work: Callable[[Tell], None], take: Callable[[dict[str, Any]], None]) -> Iterator[str | None]:
    """Have a child process do the work, and take what it tells; in the body, the child may still be there.

    A launcher that sees a child end on its own ends all of the job: what has to be said is said in the body.

    Args:
        work: what the child does.
        take: gets each message, as `Tell` has written it.

    Yields:
        Why the work did not come to its end, None if it did.
    """
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if not child:
        os.close(reading)
        _live(work, writing)
    os.close(writing)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield _listen(reading, child, take)
    finally:
        _end(child)


def _listen(reading: int, child: int, take: Callable[[dict[str, Any]], None]) -> str | None:
    doing, deadline, rest = "start", time.monotonic() + SLACK_S, b""
    try:
        while select.select([reading], [], [], max(0.0, deadline - time.monotonic()))[0]:
            if not (data := os.read(reading, 1 << 16)):
                return f"{doing}: {_how_it_ended(child)}"
            *lines, rest = (rest + data).split(b"\n")
            for message in map(json.loads, lines):
                if "end" in message:
                    return None
                if "doing" in message:
                    doing, deadline = message["doing"], time.monotonic() + message["limit_s"] + SLACK_S
                take(message)
    except InterruptedError:
        return f"{doing}: {TERMINATED}"
    return f"{doing}: no end of this within its time{STATES.get(_state(child), '')}"


def _state(child: int) -> str:
    try:
        return Path(f"/proc/{child}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def _interrupt(*_: object) -> NoReturn:
    raise InterruptedError


def within(limit_s: float, work: Callable[[], Any]) -> Any:
    """What ``work`` returns or raises, if it does so in time; a thread that hangs is left behind.

    Raises:
        TimeoutError: it takes longer.
    """
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append((True, work()))
        except BaseException as error:
            outcome.append((False, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(limit_s)
    if not outcome:
        raise TimeoutError(f"no end within {limit_s:g} s")
    is_done, result = outcome[0]
    if not is_done:
        raise result
    return result


def attempt(limit_s: float, work: Callable[[], Any]) -> Any:
    """As `within`; a failure as `{"error": words}`."""
    try:
        return within(limit_s, work)
    except Exception as error:
        words = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        return {"error": words}


def _live(work: Callable[[Tell], None], writing: int) -> NoReturn:
    """All that the child does."""
    status = EXIT_FAILURE
    try:
        # Whoever kills the process that was started means this one, too.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_FAILURE))  # what it has written is removed
        work(Tell(writing))
        status = 0
    except (KeyboardInterrupt, SystemExit):
        pass  # the process that was started says it
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _how_it_ended(child: int) -> str:
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return f"the process was ended by {signal.Signals(-status).name}" if status < 0 else "the process ended itself"


def _end(child: int) -> None:
    """Give the child a moment to end, then kill it; not even that ends one that hangs in a file system."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with suppress(ChildProcessError, ProcessLookupError):
        for number in (0, signal.SIGKILL):
            os.kill(child, number)
            deadline = time.monotonic() + END_S
            while time.monotonic() < deadline:
                if os.waitpid(child, os.WNOHANG)[0]:
                    return
                time.sleep(0.01)
