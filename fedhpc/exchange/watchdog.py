"""Ends a rank that is stuck inside MPI, where no Python code of its main thread runs any more."""

import faulthandler
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from fedhpc.job.log import log

TICK_S = 0.5
ABORT_S = 15.0
"""After MPI_Abort; the launcher ends the ranks within this time if it can."""


@contextmanager
def time_limit(limit_s: float) -> Iterator[None]:
    """End this process, with the stack of every thread on stderr, if the body takes longer.

    For MPI_Init and MPI_Finalize, in which no other Python thread runs either.
    """
    faulthandler.dump_traceback_later(limit_s, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


class Watchdog:
    """A thread that counts how long the main thread has been inside one call.

    It counts its own ticks: while a whole job is suspended, no time passes.
    """

    def __init__(self) -> None:
        self._what = ""
        self._left_s = 0.0
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    @contextmanager
    def over(self, what: str, limit_s: float) -> Iterator[None]:
        """End this process if the body takes longer."""
        self._left_s, self._what = limit_s, what
        try:
            yield
        finally:
            self._what = ""

    def _watch(self) -> None:
        while True:
            time.sleep(TICK_S)
            self._left_s -= TICK_S
            if self._what and self._left_s < 0:
                log.critical(
                    "no end of %s within exchange.timeout_s; ending this rank, and with it the job", self._what
                )
                os._exit(1)
