"""Ends a rank that is stuck inside MPI, where no Python code of its main thread runs any more, and a stuck launcher."""

import faulthandler
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedhpc.job.log import log

TICK_S = 0.5
ABORT_S = 15.0
"""After MPI_Abort; the launcher ends the ranks within this time if it can."""
LAUNCHERS = ("prterun", "prted")
"""Open MPI 5's mpirun and its daemons on other hosts, as the system names them."""
ULFM = "OMPI_MCA_mpi_ft_enable"
"""Set by `mpirun --with-ft ulfm`."""
END_LAUNCHER = "for second in $(seq $2); do sleep 1; kill -0 $1 || exit; done; kill -KILL $1"


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


def end_launcher_later() -> None:
    """End the launcher on this host if it has not ended by itself after `ABORT_S`; this rank may end before.

    mpirun waits until every host has ended its ranks: of one that it cannot reach, for a quarter of an hour.
    """
    launcher = os.getppid()
    with suppress(OSError):
        if Path(f"/proc/{launcher}/comm").read_text().strip() in LAUNCHERS:
            subprocess.Popen(
                ["sh", "-c", END_LAUNCHER, "sh", str(launcher), f"{ABORT_S:.0f}"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )


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
                if ULFM not in os.environ:  # else the other ranks may go on
                    end_launcher_later()
                os._exit(1)
