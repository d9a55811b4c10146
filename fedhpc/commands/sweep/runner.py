"""The cells of an experiment as processes of this machine: each in a session of its own, its output in its log."""

import os
import shlex
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress

from fedhpc.commands.sweep.experiment import Cell, Experiment
from fedhpc.commands.sweep.results import results
from fedhpc.commands.sweep.standing import CellLog, standing
from fedhpc.commands.sweep.stops import PASSED_ON, SIGNALS, Stops
from fedhpc.errors import EXIT_FAILURE, EXIT_STOPPED

KILLED_BY_IT = 128 + PASSED_ON
"""The exit status of a launcher, or of a rank, that was not yet ready for it."""


class Runner:
    """Runs cells, some at once; a stop signal goes to the running ones, and no other is begun."""

    def __init__(
        self,
        experiment: Experiment,
        launch: str | None,
        run: Callable[[Sequence[str]], int],
        say: Callable[[str], None],
        stops: Stops,
    ) -> None:
        self.failed: list[Cell] = []
        self._experiment, self._launch, self._run, self._say, self._stops = experiment, launch, run, say, stops
        self._running: dict[int, tuple[Cell, float]] = {}

    def run(self, cells: Sequence[Cell], at_once: int) -> None:
        """Run the cells to their end, or until a stop is requested or one says that its time is up."""
        waiting = deque(cells)
        try:
            while True:
                while waiting and len(self._running) < at_once and self._start(waiting[0]):
                    waiting.popleft()
                if not self._running:
                    return
                pid, status = os.wait()
                if pid in self._running:
                    self._end(pid, os.waitstatus_to_exitcode(status))
        except BaseException:  # a file system fails, or the machine has room for no other process
            self._stops.ask_running()
            for pid in self._running:
                os.waitpid(pid, 0)
            raise

    def _start(self, cell: Cell) -> bool:
        """Start a cell, unless a stop was requested."""
        log = CellLog(self._experiment.out, cell)
        with self._stops.held_back():
            if self._stops.requested:
                return False
            completed = standing(self._experiment, cell).completed
            begins = f"goes on after round {completed}" if completed else "begins"
            self._say(f"{self._title(cell)}: {begins}, output in {log.path}")
            try:
                log.begin(shlex.join(["fedhpc", "run", *cell.arguments]))
            except OSError as error:
                self.failed.append(cell)
                self._say(f"{self._title(cell)}: not begun: {error.filename}: {error.strerror}")
                return True
            self._running[self._stops.fork(lambda: self._be(cell, log))] = cell, time.monotonic()
        return True

    def _be(self, cell: Cell, log: CellLog) -> int:
        """The forked process: become the cell. Stop signals stay blocked until the run listens to them."""
        sys.stdout = sys.stderr = log.path.open("a", buffering=1, encoding="utf-8", errors="backslashreplace")
        for descriptor, number in ((os.open(os.devnull, os.O_RDONLY), 0), (sys.stdout.fileno(), 1)):
            os.dup2(descriptor, number)
        os.dup2(1, 2)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        if self._launch is None:
            return self._run(["run", *cell.arguments])
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        command = [*shlex.split(self._launch), sys.executable, "-m", "fedhpc", "run", *cell.arguments]
        return os.execvp(command[0], command)

    def _end(self, pid: int, code: int) -> None:
        cell, since = self._running.pop(pid)
        self._stops.running.remove(pid)
        status = 128 - code if code < 0 else code
        if status == KILLED_BY_IT and self._stops.requested:
            status = EXIT_STOPPED
        elif status == 0 and not standing(self._experiment, cell).done:
            status = EXIT_FAILURE  # Open MPI's mpirun ends with 0 when it loses a daemon on another node
        with suppress(OSError):  # a full disk; we know the status
            CellLog(self._experiment.out, cell).end(status)
        now = standing(self._experiment, cell)
        seconds = f"{time.monotonic() - since:.0f} s"
        if status == EXIT_STOPPED:
            self._stops.requested = True
            self._say(f"{self._title(cell)}: stopped after {seconds}: {now}")
        elif status:
            self.failed.append(cell)
            self._say(f"{self._title(cell)}: failed with exit status {status} after {seconds}")
        else:
            figures = results(cell, self._experiment.budget_bytes)
            name = next(name for name in ("perplexity_global", "accuracy_global") if name in figures)
            shown = "" if figures[name] is None else f", {name} {figures[name]:.4f}"
            self._say(f"{self._title(cell)}: done in {seconds}{shown}")

    def _title(self, cell: Cell) -> str:
        return f"cell {self._experiment.cells.index(cell)} {cell.name}"
