"""Log records: to stderr with time, rank and host, and to the run's log.txt."""

import logging
import sys
from pathlib import Path

from tqdm import tqdm

from fedhpc.files import naming
from fedhpc.job.console import when_lost

log = logging.getLogger("fedhpc")


def start_log(rank: int, size: int, host: str) -> None:
    """Records of this process go to stderr with time, rank and host; so does, once, that words are lost."""
    handler = _BesideProgressBar()
    handler.setFormatter(_formatter(rank, size, host))
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False
    when_lost(_say_lost)


def log_to_file(path: Path, rank: int, size: int, host: str) -> None:
    """Rank 0's records also go to the run's log.txt; of the other ranks only a fault's last words do."""
    handler = _LogFile(path)
    handler.setLevel(logging.INFO if rank == 0 else logging.CRITICAL)
    handler.setFormatter(_formatter(rank, size, host))
    log.addHandler(handler)


def _formatter(rank: int, size: int, host: str) -> logging.Formatter:
    return logging.Formatter(f"%(asctime)s %(levelname)s rank {rank}/{size} {host}: %(message)s")


def _say_lost(problem: OSError) -> None:
    log.warning("%s cannot be written: %s; the run goes on", problem.filename, problem.strerror)


class _BesideProgressBar(logging.Handler):
    """Writes to stderr without cutting a live progress bar in two."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)
        sys.stderr.flush()


class _LogFile(logging.Handler):
    """Adds to a file, which is made for the first record; what cannot be written is dropped."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.is_lost = False

    def emit(self, record: logging.LogRecord) -> None:
        line = f"{self.format(record)}\n".encode(errors="backslashreplace")
        try:
            with naming(self.path), self.path.open("ab", buffering=0) as file:
                file.write(line)
        except OSError as problem:
            if not self.is_lost:
                self.is_lost = True
                _say_lost(problem)
