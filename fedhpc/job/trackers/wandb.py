"""Weights & Biases: files for `wandb sync`, or its server at once."""

import shutil
import threading
import urllib.error
import urllib.request
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from fedhpc.errors import ConfigError, first_line
from fedhpc.job.run_files import RunFiles
from fedhpc.job.tracker import Tracker, TrackerConfig
from fedhpc.job.tracking import check_writable, hyper_parameters, load_package, numbers, remembered, title
from fedhpc.registry import TRACKERS

ANSWER_S = 5.0
"""How long the server may take to answer, name look-up included."""
OTHERWISE = "or set mode: offline, and send the run later with `wandb sync`"


@TRACKERS.register("wandb")
class WandB(Tracker):
    """Online, a round that the run has already is not sent again. Offline, each start writes all rounds anew."""

    class Config(TrackerConfig):
        """Where to."""

        project: str = Field(default="fedhpc", min_length=1)
        """Its name at Weights & Biases."""
        entity: str | None = None
        """User or team that has the project; `null`: that of the key."""
        mode: Literal["offline", "online"] = "offline"
        """`offline`: files in `trackers/wandb` of the run directory, for `wandb sync`. `online`: sent at once, with a
        key, from a node that reaches the server."""

    def check_ready(self, run_dir: Path) -> None:
        """See `Tracker`."""
        load_package(self.config.kind)
        check_writable(self.config.kind, RunFiles(run_dir).trackers)
        if self.config.mode == "online":
            self._check_online()

    def begin(self, run: Any, run_dir: Path, earlier: Sequence[Mapping[str, Any]]) -> None:
        """See `Tracker`."""
        import wandb

        name = remembered(run_dir, self.config.kind, lambda: uuid.uuid4().hex)
        folder, is_online = RunFiles(run_dir).trackers, self.config.mode == "online"
        for old in folder.glob(f"wandb/offline-run-*-{name}"):
            shutil.rmtree(old)  # sent beside the new one, its rounds would be there twice
        no_more = {"console": "off", "silent": True, "disable_git": True, "disable_code": True, "x_disable_stats": True}
        no_more |= {"x_disable_meta": True, "x_disable_machine_info": True, "x_save_requirements": False}
        self._run = wandb.init(
            **self.config.model_dump(exclude={"kind"}),
            id=name,
            name=title(run_dir),
            resume="allow" if is_online else None,
            dir=str(folder),
            config=hyper_parameters(run),
            allow_val_change=True,
            reinit="create_new",
            settings=wandb.Settings(**no_more),
        )
        for metrics in earlier:
            self.record(metrics)

    def record(self, metrics: Mapping[str, Any]) -> None:
        """See `Tracker`."""
        if metrics["round"] >= self._run.step:
            self._run.log(numbers(metrics), step=metrics["round"], commit=True)

    def end(self) -> None:
        """See `Tracker`."""
        self._run.summary["ending"] = self.ending
        self._run.finish(exit_code=int(self.ending == "failed"))

    def _check_online(self) -> None:
        import wandb
        from wandb.sdk import wandb_setup

        try:
            problem = "" if wandb.login(prompt=False, verify=False) else "there is none."
        except wandb.Error as error:
            problem = first_line(error)
        if problem:
            raise ConfigError(f"trackers: wandb: mode: online needs a key: {problem} Set WANDB_API_KEY, {OTHERWISE}")
        server, answers = wandb_setup.singleton().settings.base_url, threading.Event()

        def ask() -> None:
            with suppress(OSError):
                with suppress(urllib.error.HTTPError):  # an answer, too
                    urllib.request.urlopen(server, timeout=ANSWER_S).close()
                answers.set()

        threading.Thread(target=ask, daemon=True).start()
        if not answers.wait(ANSWER_S):
            raise ConfigError(
                f"trackers: wandb: mode: online, but {server} does not answer within {ANSWER_S:g} s from this node; "
                f"start where it can be reached, {OTHERWISE}"
            )
