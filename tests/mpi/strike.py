"""A job under a real mpirun whose ranks are struck by signals: find them, strike, see what is left."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from launch import MPIRUN, command, environment

from fedhpc.job.environment import start_ticks

RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMI_RANK")
POLL_S = 0.02
NAP_S = 0.001


class Job:
    """Ranks under mpirun, their output in a file; a context manager that leaves none of their processes.

    Args:
        hosts: emulated ones (`hosts.Hosts`) that the ranks are spread over, mpirun being on the first; else this one.
        launcher: of another MPI, with the environment `variables` that it needs.
    """

    def __init__(self, num_ranks, *arguments, output, options=(), hosts=None, launcher=MPIRUN, variables=()):
        self.num_ranks, self.output, self.started = num_ranks, output, time.monotonic()
        self._elsewhere = hosts.entered if hosts else {}
        if hosts:
            start = hosts.command("node1", *hosts.spread(num_ranks, *options, sys.executable, *arguments))
        else:
            start = command(num_ranks, *arguments, options=options, launcher=launcher)
        with output.open("ab") as file:
            self.launcher = subprocess.Popen(
                start,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment() | dict(variables),
                start_new_session=True,
            )
        self._seen = {self.launcher.pid: start_ticks(self.launcher.pid)}
        """Processes of the job -> when they started, by which the next process of the same number is told apart."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()

    @property
    def ended(self):
        return self.launcher.poll() is not None

    def look(self):
        """Take note of the job's processes; the numbers of those that are alive, parents before children."""
        parents = {}
        for path in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                parents[int(path.parent.name)] = int(path.read_text(errors="replace").rpartition(")")[2].split()[1])
        self._seen |= {pid: ticks for pid, ticks in list(self._elsewhere.items()) if ticks}
        alive = [pid for pid, ticks in self._seen.items() if start_ticks(pid) == ticks]
        for pid in alive:  # grows
            for child in (child for child, parent in parents.items() if parent == pid and child not in alive):
                if ticks := start_ticks(child):
                    self._seen[child] = ticks
                    alive.append(child)
        return alive

    def find(self, rank):
        """The process of a rank, as soon as it runs; None if the job ends before."""
        wanted = {f"{name}={rank}".encode() for name in RANK_VARIABLES}
        while not self.ended:
            for pid in self.look():
                with suppress(OSError):
                    if wanted & set(Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")):
                        return pid
            time.sleep(POLL_S)
        return None

    def strike(self, pid, number):
        """Send a signal to a process of the job; whether it was there to take it."""
        if pid is None or start_ticks(pid) != self._seen[pid]:
            return False
        os.kill(pid, number)
        return True

    def until(self, condition, seconds):
        """Whether it comes true within this time and before the job ends."""
        deadline = time.monotonic() + seconds
        while not (true := condition()) and not self.ended and time.monotonic() < deadline:
            time.sleep(NAP_S)
        return true

    def wait(self, seconds, watch=lambda: None):
        """The exit status, or None if the job has not ended within this time; `watch` is called again and again."""
        deadline = time.monotonic() + seconds
        while not self.ended and time.monotonic() < deadline:
            self.look()
            watch()
            time.sleep(POLL_S)
        watch()
        return self.launcher.poll()

    def left(self, seconds=5.0):
        """The processes that are still alive so long after the launcher's end."""
        deadline = time.monotonic() + seconds
        while (alive := self.look()) and time.monotonic() < deadline:
            time.sleep(POLL_S)
        return alive

    def kill(self):
        """End whatever is left."""
        while alive := self.look():
            for pid in alive:
                self.strike(pid, signal.SIGKILL)
            self.launcher.poll()
            time.sleep(POLL_S)
        self.launcher.wait()

    def text(self):
        """What the job has said."""
        return self.output.read_text(errors="replace")


def catches(pid, number):
    """Whether a process has a handler for a signal; without one the signal ends it."""
    with suppress(OSError):
        mask = Path(f"/proc/{pid}/status").read_text().partition("SigCgt:")[2].split()[0]
        return bool(int(mask, 16) >> (number - 1) & 1)
    return False


class CheckpointFiles:
    """What there is of a run's checkpoint that is being written."""

    def __init__(self, run_dir):
        self.folder = run_dir / "checkpoints" / "partial"
        self.known = self.names()

    def names(self):
        with suppress(OSError):
            return {".", *os.listdir(self.folder)}
        return set()

    def count_new(self):
        """How many names have appeared since the last look."""
        before, self.known = self.known, self.names()
        return len(self.known - before)
