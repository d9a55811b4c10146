"""Trackers: what else sees each round's metrics, beside metrics.jsonl."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from fedhpc.config import Config
from fedhpc.config.sections import Section
from fedhpc.job.log import log
from fedhpc.registry import TRACKERS


class TrackerConfig(Section):
    """An entry of `trackers`; a tracker's own keys come in a subclass."""

    kind: str
    """The tracker."""


class Tracker(ABC):
    """Sees the metrics of each round, on rank 0. What it raises is logged and ends the tracker, never the run."""

    Config: ClassVar[type[TrackerConfig]] = TrackerConfig

    def __init__(self, config: Any) -> None:
        self.config = config

    def begin(self, run: Any, run_dir: Path, earlier: Sequence[Mapping[str, Any]]) -> None:
        """A run begins, or goes on.

        Args:
            run: its `fedhpc.config.Config`.
            run_dir: its folder.
            earlier: metrics of the rounds before, which another process may have tracked already.
        """
        return

    @abstractmethod
    def record(self, metrics: Mapping[str, Any]) -> None:
        """A round is over; its line of metrics.jsonl. After an interruption the same round may come again."""

    def end(self) -> None:
        """The run is done, or stops for now."""
        return


class Trackers:
    """All trackers of a run."""

    def __init__(self, config: Config) -> None:
        self._all = [TRACKERS[entry.kind](entry) for entry in config.tracker_sections]
        self._trackers: list[Tracker] = []
        """Those that have begun and not failed."""

    def begin(self, *args: Any) -> None:
        """See `Tracker`."""
        self._trackers = list(self._all)
        self._tell("begin", *args)

    def record(self, metrics: Mapping[str, Any]) -> None:
        """See `Tracker`."""
        self._tell("record", metrics)

    def end(self) -> None:
        """See `Tracker`."""
        self._tell("end")
        self._trackers = []

    def _tell(self, what: str, *args: Any) -> None:
        for tracker in list(self._trackers):
            try:
                getattr(tracker, what)(*args)
            except Exception:
                self._trackers.remove(tracker)
                log.exception("tracker %s has failed and sees no more rounds", tracker.config.kind)
