"""TensorBoard: event files."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedhpc.config.sections import PathName
from fedhpc.job.tracker import Tracker, TrackerConfig
from fedhpc.job.tracking import check_writable, hyper_parameters, load_package, next_round, numbers
from fedhpc.registry import TRACKERS


@TRACKERS.register("tensorboard")
class TensorBoard(Tracker):
    """Every start has an event file of its own, which takes back what earlier ones say of rounds that come again."""

    class Config(TrackerConfig):
        """Where to."""

        folder: PathName = "trackers/tensorboard"
        """For the event files; a relative one is in the run directory."""

    def check_ready(self, run_dir: Path) -> None:
        """See `Tracker`."""
        load_package(self.config.kind, "tensorboard.summary.writer.event_file_writer")
        check_writable(self.config.kind, run_dir / self.config.folder)

    def begin(self, run: Any, run_dir: Path, earlier: Sequence[Mapping[str, Any]]) -> None:
        """See `Tracker`."""
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._writer = EventFileWriter(str(run_dir / self.config.folder))
        self._write(next_round(earlier), session_log=SessionLog(status=SessionLog.START))
        self._write(0, summary=hparams_pb(hyper_parameters(run), trial_id=str(run_dir.resolve())))

    def record(self, metrics: Mapping[str, Any]) -> None:
        """See `Tracker`."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in numbers(metrics).items()]
        self._write(metrics["round"], summary=Summary(value=values))

    def end(self) -> None:
        """See `Tracker`."""
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.hparams import api_pb2, metadata
        from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo

        status = {"finished": api_pb2.STATUS_SUCCESS, "failed": api_pb2.STATUS_FAILURE}
        info = SessionEndInfo(status=status.get(self.ending, api_pb2.STATUS_UNKNOWN), end_time_secs=time.time())
        about = metadata.create_summary_metadata(HParamsPluginData(session_end_info=info))
        value = Summary.Value(tag=metadata.SESSION_END_INFO_TAG, metadata=about, tensor=metadata.NULL_TENSOR)
        self._write(0, summary=Summary(value=[value]))
        self._writer.close()

    def _write(self, step: int, **what: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._writer.add_event(Event(wall_time=time.time(), step=step, **what))
        self._writer.flush()
