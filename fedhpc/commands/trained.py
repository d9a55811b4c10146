"""What a run has tuned, as of its newest valid checkpoint."""

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np

from fedhpc.checkpoint.device_state import PERSONAL, DeviceState
from fedhpc.checkpoint.files import LOCAL, SERVER_FILE, Position, files_of, stem_of
from fedhpc.checkpoint.state_file import RunState
from fedhpc.checkpoint.store import Checkpoints
from fedhpc.config.file import load_config
from fedhpc.data.tasks import Kind
from fedhpc.data.tokens import TextEncoder
from fedhpc.errors import CheckpointError
from fedhpc.job.run_files import RunFiles
from fedhpc.model.limits import most_tokens
from fedhpc.server.job import Job, checked_tokenizer, load_job, load_state


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A run's tuned parameters."""

    job: Job
    device: int | None
    """Whose personal parameters these are; None: the global ones, untrained where they are not exchanged."""
    rounds: int
    """Rounds completed."""
    tensors: dict[str, np.ndarray]
    """Whole, by the names that the tuning gives them."""

    @property
    def max_length(self) -> int:
        """Tokens that a new text is cut to."""
        return most_tokens(self.job.config, self.job.data.description, self.job.shape)

    def text_encoder(self) -> TextEncoder:
        """What puts and cuts new text as the prepared data were."""
        found, tokenizer = self.job.data.description, checked_tokenizer(self.job)
        return TextEncoder(found.template, tokenizer, kind=cast(Kind, found.kind), max_length=self.max_length)


def load_trained(run_dir: str, device: int | None = None, *, to_use: bool = True) -> Trained:
    """The global parameters of a run, or one device's personal ones.

    Args:
        run_dir: the run's folder.
        device: whose; None: the global ones.
        to_use: whether they must all be trained, to predict with.

    Raises:
        CheckpointError: there is no run, no checkpoint, or nothing of that device's own in it; or devices keep what
            would be used.
        UserError: the model or the prepared data are not what they were.
    """
    path = RunFiles(run_dir).config
    if not path.is_file():
        found = "holds no config.yaml" if Path(run_dir).is_dir() else "is no folder"
        raise CheckpointError(f"{run_dir} {found}; give the run_dir of a run")
    job = load_job(load_config(path).model_copy(update={"run_dir": run_dir}))
    if to_use and device is None and (kept := job.config.exchange.keep):
        raise CheckpointError(
            f"{run_dir}: the devices of this run keep {', '.join(kept)} (exchange.keep), which the server has as "
            "before round 0; give --device I for the whole of a device's"
        )
    needed = {SERVER_FILE} if device is None else {SERVER_FILE, f"{LOCAL}/{device:06d}"}

    def load() -> tuple[RunState, DeviceState]:
        state = load_state(job, "auto", needs=lambda name: stem_of(name) in needed, to_train=False)
        if state is None:
            raise CheckpointError(
                f"{run_dir} has no checkpoint yet; `fedhpc run` writes one every checkpoint.every rounds"
            )
        return state, DeviceState(local=state.unseen_local) if device is None else _state_of(device, job, state)

    state, own = Checkpoints(run_dir).undisturbed(load)
    job.tuning.added = state.added
    tensors = job.tuning.merge(own.kept.get(PERSONAL, state.server.params), own.local, state.layers)
    if device is not None:
        tensors = job.tuning.on_device(tensors, device)
    return Trained(job=job, device=device, rounds=state.server.round, tensors=tensors)


def _state_of(device: int, job: Job, state: RunState) -> DeviceState:
    last = job.config.federation.num_devices - 1
    if not 0 <= device <= last:
        raise CheckpointError(f"--device {device}: this run has the devices 0 to {last}")
    has_personal = job.config.parts["server"].has_personal
    if not has_personal and not job.tuning.trains_local(state.layers):
        raise CheckpointError(
            f"--device {device}: this run exchanges everything it trains, so devices have nothing of their own; leave "
            "--device out"
        )
    checkpoints, position = Checkpoints(job.config.run_dir), Position.of(state)
    states = checkpoints.load_states(position, {device}, job.tuning, state.layers, state.unseen_local)
    if not has_personal and device in states and np.array_equal(states[device].local, state.unseen_local):
        when = "in the warm-up of selection.ratio: auto only" if job.config.selection.is_automatic else "in vain so far"
        raise CheckpointError(
            f"--device {device}: has nothing of its own up to round {state.server.round}: it was trained {when}; leave "
            "--device out"
        )
    if device not in states:
        seen = ", ".join(map(str, sorted(files_of(checkpoints.device_files(position), LOCAL)))) or "none"
        raise CheckpointError(
            f"--device {device}: has not been trained up to round {state.server.round}; those that have: {seen}"
        )
    return states[device]
