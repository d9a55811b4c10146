"""MLflow: files in the run directory, or a tracking server."""

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import Field

from fedhpc.job.run_files import RunFiles
from fedhpc.job.tracker import Tracker, TrackerConfig
from fedhpc.job.tracking import check_writable, hyper_parameters, load_package, numbers, remembered, title
from fedhpc.registry import TRACKERS

MOST_PARAMETERS = 100
"""In one request."""
STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


@TRACKERS.register("mlflow")
class MLflow(Tracker):
    """A number that the run has of a round already is not written again."""

    class Config(TrackerConfig):
        """Where to."""

        tracking_uri: str | None = Field(default=None, min_length=1)
        """As MLflow takes it, of a server or a folder; `null`: files in `trackers/mlflow` of the run directory."""
        experiment: str = Field(default="fedhpc", min_length=1)
        """Its name there; made where it is missing."""

    def check_ready(self, run_dir: Path) -> None:
        """See `Tracker`."""
        load_package(self.config.kind)
        if self.config.tracking_uri is None:
            check_writable(self.config.kind, Path(self._uri(run_dir)))
        elif (where := urlsplit(self.config.tracking_uri)).scheme in ("", "file") and where.path != "databricks":
            check_writable(self.config.kind, Path(where.path))

    def begin(self, run: Any, run_dir: Path, earlier: Sequence[Mapping[str, Any]]) -> None:
        """See `Tracker`."""
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # otherwise refused, as no longer extended
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = MlflowClient(tracking_uri=self._uri(run_dir))
        self._id = remembered(run_dir, self.config.kind, lambda: self._new_run(title(run_dir)))
        self._client.update_run(self._id, status="RUNNING")
        known = self._client.get_run(self._id).data
        new = [Param(key, str(value)) for key, value in hyper_parameters(run).items() if key not in known.params]
        for start in range(0, len(new), MOST_PARAMETERS):
            self._client.log_batch(self._id, params=new[start : start + MOST_PARAMETERS])
        history = self._client.get_metric_history
        self._rounds = {name: {point.step for point in history(self._id, name)} for name in known.metrics}
        for metrics in earlier:
            self.record(metrics)

    def record(self, metrics: Mapping[str, Any]) -> None:
        """See `Tracker`."""
        from mlflow.entities import Metric

        now, step = int(1000 * time.time()), metrics["round"]
        found = numbers(metrics).items()
        new = [Metric(name, value, now, step) for name, value in found if step not in self._rounds.get(name, ())]
        if new:
            self._client.log_batch(self._id, metrics=new)
        for metric in new:
            self._rounds.setdefault(metric.key, set()).add(step)

    def end(self) -> None:
        """See `Tracker`."""
        self._client.set_terminated(self._id, STATUS[self.ending])

    def _uri(self, run_dir: Path) -> str:
        return self.config.tracking_uri or str((RunFiles(run_dir).trackers / "mlflow").absolute())

    def _new_run(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        experiment = self.config.experiment
        try:
            number = self._client.create_experiment(experiment)
        except MlflowException:
            found = self._client.get_experiment_by_name(experiment)
            if found is None:
                raise
            number = found.experiment_id
        return str(self._client.create_run(number, run_name=name).info.run_id)
