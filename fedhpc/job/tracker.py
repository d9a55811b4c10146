"""Trackers: what else sees each round's metrics, beside metrics.jsonl."""

import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from queue import Empty, Full, Queue
from typing import Any, ClassVar, Literal

from fedhpc.config import Config
from fedhpc.config.sections import Section
from fedhpc.errors import first_line
from fedhpc.job.log import log
from fedhpc.registry import TRACKERS

Ending = Literal["finished", "stopped", "failed"]
MOST_WAITING = 1000
"""Rounds that wait for a slow tracker."""
END_S = 5.0
"""How long the end of a run waits for all its trackers."""


class TrackerConfig(Section):
    """An entry of `trackers`; a tracker's own keys come in a subclass."""

    kind: str
    """The tracker."""


class Tracker(ABC):
    """Sees the metrics of each round, on rank 0.

    A thread of its own calls `begin`, `record` and `end`, in this order, and no round waits for it. What they raise is
    logged and ends the tracker, never the run.
    """

    Config: ClassVar[type[TrackerConfig]] = TrackerConfig
    ending: Ending = "finished"
    """When `end` is called: how the run has ended; one that has stopped may go on."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def check_ready(self, run_dir: Path) -> None:
        """Refuse a run that cannot be tracked, before anything is trained and within seconds; on the main thread.

        Args:
            run_dir: the run's folder.

        Raises:
            ConfigError: with what was found and what is valid.
        """
        return

    def begin(self, run: Any, run_dir: Path, earlier: Sequence[Mapping[str, Any]]) -> None:
        """A run begins, or goes on.

        Args:
            run: its `fedhpc.config.Config`.
            run_dir: its folder. What is in `trackers` there is put aside when a run begins anew.
            earlier: metrics of the rounds before, which another process may have tracked already.
        """
        return

    @abstractmethod
    def record(self, metrics: Mapping[str, Any]) -> None:
        """A round is over; its line of metrics.jsonl. After an interruption the same round may come again."""

    def end(self) -> None:
        """The run is done, or stops for now; it waits for all its trackers together five seconds at most."""
        return


class Trackers:
    """All trackers of a run."""

    def __init__(self, config: Config) -> None:
        self._trackers = make_trackers(config)
        self._is_private = config.privacy.is_on
        self._threads: list[_Thread] = []
        """Of those that have begun."""

    def begin(self, run: Config, run_dir: Path, earlier: Sequence[Mapping[str, Any]]) -> None:
        """See `Tracker`."""
        earlier = [self._told(metrics) for metrics in earlier]
        self._threads = [_Thread(tracker) for tracker in self._trackers]
        for thread in self._threads:
            thread.start()
            thread.tell("begin", run, run_dir, earlier)

    def record(self, metrics: Mapping[str, Any]) -> None:
        """See `Tracker`."""
        for thread in self._threads:
            thread.tell("record", self._told(metrics))

    def end(self, ending: Ending) -> None:
        """See `Tracker`."""
        until = time.monotonic() + END_S
        for thread in self._threads:
            thread.tracker.ending = ending
            thread.tell("end")
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
            if thread.is_alive():
                thread.warn(f"is not done {END_S:g} s after the run; what it has not taken yet is lost to it")
        self._threads = []

    def _told(self, metrics: Mapping[str, Any]) -> Mapping[str, Any]:
        """Under `privacy`, nobody is told seconds, which depend on who takes part."""
        if not self._is_private:
            return metrics
        return {name: value for name, value in metrics.items() if name != "seconds"}


def make_trackers(config: Config) -> list[Tracker]:
    """The trackers that a configuration names."""
    return [TRACKERS[entry.kind](entry) for entry in config.tracker_sections]


def any_at_work() -> bool:
    """Whether a tracker is, that its run waits for no more. Python's own end could wait for it for ever."""
    return any(isinstance(thread, _Thread) for thread in threading.enumerate())


class _Thread(threading.Thread):
    """Calls a tracker, in order."""

    def __init__(self, tracker: Tracker) -> None:
        super().__init__(daemon=True)
        self.tracker = tracker
        self._calls: Queue[tuple[str, tuple[Any, ...]]] = Queue(MOST_WAITING)
        self._has_warned = False

    def tell(self, what: str, *args: Any) -> None:
        """Have it called, unless it has failed; what it is too slow for is left out."""
        if not self.is_alive():
            return
        try:
            self._calls.put_nowait((what, args))
        except Full:
            if what == "end":
                with suppress(Empty):
                    self._calls.get_nowait()
                self._calls.put_nowait((what, args))
            self.warn(f"is {MOST_WAITING} rounds behind; rounds that find no place are left out")

    def run(self) -> None:
        """What the thread does."""
        what = ""
        try:
            while what != "end":
                what, args = self._calls.get()
                getattr(self.tracker, what)(*args)
        except BaseException as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            self.warn(
                f"has failed and sees no more rounds: {type(error).__name__}: {first_line(error)} "
                f"({where.filename}, line {where.lineno})"
            )

    def warn(self, words: str) -> None:
        """Say what is wrong with it, the first time."""
        if not self._has_warned:
            self._has_warned = True
            log.warning("tracker %s %s", self.tracker.config.kind, words)
