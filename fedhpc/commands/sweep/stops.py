"""Requests to stop a sweep: noted, and handed to the processes that it has started."""

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from fedhpc.errors import EXIT_FAILURE, EXIT_STOPPED
from fedhpc.job.console import run_command
from fedhpc.job.stopping import STOP_SIGNALS

IS_DETACHED = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
SIGNALS = (*STOP_SIGNALS, signal.SIGINT, *(() if IS_DETACHED else (signal.SIGHUP,)))
"""A terminal that closes is a request to stop, but for `nohup`."""
PASSED_ON = signal.SIGUSR1
"""The one stop signal that every MPI launcher hands to its ranks instead of ending them."""


class Stopped(BaseException):
    """Ends what a process does aside."""


class Stops:
    """Whether a stop was requested, and who has to hear of it."""

    def __init__(self) -> None:
        self.requested = False
        self.running: set[int] = set()
        """Processes."""

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Meanwhile, signals are requests to stop."""
        before = {number: signal.signal(number, self.pass_on) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def pass_on(self, number: int, _: object) -> None:
        """The signals' handler."""
        self.requested = True
        self.ask_running()
        text = f"{signal.Signals(number).name}: asked {len(self.running)} running process(es) to stop\n"
        with suppress(OSError):  # the terminal may be gone
            os.write(2, text.encode())  # not by print, which may be at work this very moment

    def ask_running(self) -> None:
        """Have the running processes stop."""
        for pid in self.running:
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(pid, PASSED_ON)

    @contextmanager
    def held_back(self) -> Iterator[None]:
        """Meanwhile, no signal comes to this thread."""
        sys.stdout.flush()
        sys.stderr.flush()
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def fork(self, become: Callable[[], int]) -> int:
        """Start a process with the stop signals blocked, within `held_back`; its number.

        Args:
            become: what it does; its exit status.
        """
        if (pid := os.fork()) == 0:
            status = EXIT_FAILURE
            try:
                os.setsid()
                status = become()
            except SystemExit as end:
                status = end.code if isinstance(end.code, int) else EXIT_FAILURE
            except BaseException:
                traceback.print_exc()
            finally:
                try:
                    sys.stdout.flush()
                    sys.stderr.flush()
                finally:
                    os._exit(status)
        self.running.add(pid)
        if self.requested:  # meanwhile: only this thread's signals are blocked, and others take them too
            self.ask_running()
        return pid

    def aside(self, work: Callable[[], int]) -> int:
        """Do something in a process of its own, which a stop ends within; its exit status.

        What loads models or computes must not be in this process, whose forks the cells are.
        """
        with self.held_back():
            if self.requested:
                return EXIT_STOPPED
            pid = self.fork(lambda: _stoppable(work))
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        self.running.remove(pid)
        status = 128 - code if code < 0 else code
        self.requested |= status == EXIT_STOPPED
        return status


def _stoppable(work: Callable[[], int]) -> int:
    def stop(*_: object) -> None:
        signal.signal(PASSED_ON, signal.SIG_IGN)  # what ends now is not to be disturbed
        raise Stopped

    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(PASSED_ON, stop)
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return run_command(work, "fedhpc: ")
    except Stopped:
        return EXIT_STOPPED
