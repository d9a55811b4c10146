"""Trackio: the local dashboard of Hugging Face."""

import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from fedhpc.job.tracker import Tracker, TrackerConfig
from fedhpc.job.tracking import check_writable, hyper_parameters, load_package, numbers, remembered, title
from fedhpc.registry import TRACKERS


@TRACKERS.register("trackio")
class Trackio(Tracker):
    """A round that the run has already is not written again."""

    class Config(TrackerConfig):
        """Where to."""

        project: str = Field(default="fedhpc", min_length=1)
        """The runs that one dashboard shows."""

    def check_ready(self, run_dir: Path) -> None:
        """See `Tracker`."""
        load_package(self.config.kind)
        from huggingface_hub.constants import HF_HOME

        check_writable(self.config.kind, Path(os.environ.get("TRACKIO_DIR") or Path(HF_HOME) / "trackio"))

    def begin(self, run: Any, run_dir: Path, earlier: Sequence[Mapping[str, Any]]) -> None:
        """See `Tracker`."""
        import trackio

        self._run = trackio.init(
            project=self.config.project,
            name=remembered(run_dir, self.config.kind, lambda: f"{title(run_dir)}-{uuid.uuid4().hex[:8]}"),
            config=hyper_parameters(run),
            resume="allow",
            embed=False,
            auto_log_cpu=False,
            auto_log_gpu=False,
        )
        self._next = self._run._next_step
        for metrics in earlier:
            self.record(metrics)

    def record(self, metrics: Mapping[str, Any]) -> None:
        """See `Tracker`."""
        if metrics["round"] >= self._next:
            self._next = metrics["round"] + 1
            self._run.log(numbers(metrics), step=metrics["round"])

    def end(self) -> None:
        """See `Tracker`."""
        from trackio import AlertLevel

        self._run.alert(f"the run has {self.ending}", level=AlertLevel.INFO)
        self._run.finish()
