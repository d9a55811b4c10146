"""status.json, written by rank 0 beside the run, which neither waits for it nor depends on it."""

import os
import re
import threading
import time
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Self

from fedhpc.config import Config
from fedhpc.exchange import Exchange
from fedhpc.files import write_whole
from fedhpc.job.lock import RunLock
from fedhpc.job.log import log
from fedhpc.job.status import STATUS_FILE, RankStatus, Status

EVERY_S = 2.0
LAST_S = 5.0
"""A run that ends waits at most so long for a file system that is writing the file."""
STEPS = re.compile(r" step \d+ of \d+")
DEVICES = re.compile(r": device \d.*")
DEVICE = re.compile(r"device \d+")


class StatusFile:
    """Keeps the file up to date from a thread of its own, with the newest state alone; a context manager."""

    def __init__(self, config: Config, exchange: Exchange, lock: RunLock) -> None:
        """Get ready; `lock` is that of the run directory, whose holder alone writes there."""
        self.path = Path(config.run_dir) / STATUS_FILE
        self._exchange, self._lock = exchange, lock
        self._is_private = config.privacy.is_on
        self._start = time.monotonic()
        self._since: dict[tuple[int, str], float] = {}
        """Rank and what it is at -> when it was first seen there."""
        self._over = threading.Event()
        self._is_lost = False
        self._thread = threading.Thread(target=self._keep, name="status", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(LAST_S)

    def _keep(self) -> None:
        while not self._over.is_set():
            if not self._lock.lost:
                self._write()
            self._over.wait(EVERY_S)
        if not self._lock.lost:
            with suppress(OSError):
                self.path.unlink()

    def _write(self) -> None:
        try:
            write_whole(self.path, self.status().packed(), lasting=False)
        except OSError as problem:
            if not self._is_lost:
                self._is_lost = True
                log.warning("%s cannot be written: %s; the run goes on", self.path, problem.strerror)

    def status(self) -> Status:
        """What there is to be said now."""
        now = time.monotonic()
        ranks = [self._told(rank) for rank in self._exchange.heard()]
        at = {(rank.rank, STEPS.sub("", rank.doing)): rank for rank in ranks}
        self._since = {key: self._since.get(key, now) for key in at}
        return Status(
            written=datetime.now().astimezone().isoformat(timespec="seconds"),
            process=os.getpid(),
            up_s=now - self._start,
            stop=self._exchange.stop.reason,
            stops_in_s=self._exchange.stop.seconds_left,
            ranks=[replace(rank, for_s=now - self._since[key]) for key, rank in at.items()],
        )

    def _told(self, rank: RankStatus) -> RankStatus:
        """Under `privacy`, nobody is told which devices take part."""
        if not self._is_private:
            return rank
        return replace(rank, doing=DEVICE.sub("a device", DEVICES.sub("", rank.doing)))
