"""One device's local epochs: from the broadcast parameters to a DeviceUpdate."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray

from fedhpc.config import Config
from fedhpc.data import Split
from fedhpc.errors import Halt
from fedhpc.models import Backbone
from fedhpc.seeding import derive_seed, generator
from fedhpc.tuning import Tuning
from fedhpc.tuning.base import as_parameters
from fedhpc.updates import Vector

Moments = dict[str, NDArray[np.float32]]
"""Adam's moments and step count by name, `<tensor>.<exp_avg|exp_avg_sq|step>`."""


@dataclass(frozen=True, kw_only=True)
class DeviceState:
    """What a device keeps between its rounds; it never leaves the device's rank but for a checkpoint."""

    local: Vector
    """p_i, tensors of the layers that are not exchanged."""
    steps_taken: int = 0
    moments: Moments | None = None
    """Only with `device.reset_moments: false`."""


@dataclass(frozen=True, kw_only=True)
class DeviceUpdate:
    """The outcome of a local update; `params`, `num_examples`, `num_steps` are uploaded."""

    params: Vector
    num_examples: int
    num_steps: int
    loss: float
    state: DeviceState


@dataclass(frozen=True, kw_only=True)
class UnfinishedUpdate:
    """A local update that was stopped between two steps, with all that it takes to go on to the same bits."""

    tensors: dict[str, NDArray[np.float32]]
    """All trainable tensors, whole."""
    moments: Moments
    losses: NDArray[np.float32]
    """One for each step taken; shape [k]."""


def learning_rate(config: Config, round_index: int) -> float:
    """eta of a round; `linear` falls to zero over the whole run, in steps of one round."""
    if config.device.schedule == "constant":
        return config.device.learning_rate
    return config.device.learning_rate * (1 - round_index / config.federation.rounds)


def local_update(
    config: Config,
    backbone: Backbone,
    tuning: Tuning,
    layers: tuple[int, ...],
    *,
    start: Vector,
    state: DeviceState,
    split: Split,
    examples: NDArray[np.int64],
    round_index: int,
    device: int,
    begun: UnfinishedUpdate | None = None,
    beat: Callable[[str], None] = lambda activity: None,
) -> DeviceUpdate | UnfinishedUpdate:
    """E epochs of AdamW over a device's shard (design, section 4), from P^t and the device's own p_i.

    Args:
        begun: go on with this update instead of beginning at P^t.
        beat: called with words on what happens before every step; its Halt ends the update unfinished.
    """
    tensors = begun.tensors if begun else tuning.merge(start, state.local, layers)
    params = as_parameters(tensors, backbone.torch_device)
    optimizer = torch.optim.AdamW(
        params.values(), lr=learning_rate(config, round_index), weight_decay=config.device.weight_decay
    )
    if (moments := begun.moments if begun else state.moments) is not None:
        _load_moments(optimizer, params, moments)
    losses = list(torch.from_numpy(begun.losses).to(backbone.torch_device)) if begun else []
    plan = list(batches(config, examples, round_index=round_index, device=device))
    backbone.training_mode(True)
    for batch_examples in islice(plan, len(losses), None):
        try:
            beat(f"training device {device} in round {round_index}, step {len(losses) + 1} of {len(plan)}")
        except Halt:
            return UnfinishedUpdate(
                tensors={name: p.detach().cpu().numpy() for name, p in params.items()},
                moments=_save_moments(optimizer, params),
                losses=np.array([loss.item() for loss in losses], np.float32),
            )
        if config.model.backbone_dropout or config.tuning.dropout:
            torch.manual_seed(
                derive_seed(config.seed, purpose=f"dropout {len(losses)}", round_index=round_index, device=device)
            )
        batch = split.batch(batch_examples).to(backbone.torch_device)
        loss = tuning.loss(tuning.forward(backbone, params, batch, training=True), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params.values(), config.device.max_grad_norm)
        optimizer.step()
        losses.append(loss.detach())
    uploaded, local = tuning.split({name: p.detach().cpu().numpy() for name, p in params.items()}, layers)
    moments = None if config.device.reset_moments else _save_moments(optimizer, params)
    return DeviceUpdate(
        params=uploaded,
        num_examples=len(examples),
        num_steps=len(losses),
        loss=float(np.average(torch.stack(losses).double().cpu().numpy(), weights=[len(batch) for batch in plan])),
        state=DeviceState(local=local, steps_taken=state.steps_taken + len(losses), moments=moments),
    )


def batches(
    config: Config, examples: NDArray[np.int64], *, round_index: int, device: int
) -> Iterator[NDArray[np.int64]]:
    """A device's batches of one round, in an order fixed by (seed, round, device); an epoch's last may be short."""
    size = config.device.batch_size
    for epoch in range(config.device.epochs):
        rng = generator(config.seed, purpose=f"batch order {epoch}", round_index=round_index, device=device)
        order = rng.permutation(examples)
        for first in range(0, len(order), size):
            yield order[first : first + size]


def _save_moments(optimizer: torch.optim.AdamW, params: dict[str, torch.Tensor]) -> Moments:
    return {
        f"{name}.{key}": value.cpu().numpy()
        for name, parameter in params.items()
        for key, value in optimizer.state[parameter].items()
    }


def _load_moments(optimizer: torch.optim.AdamW, params: dict[str, torch.Tensor], moments: Moments) -> None:
    for name, parameter in params.items():
        optimizer.state[parameter] = {
            # PyTorch keeps the step count on the CPU.
            key: torch.from_numpy(moments[f"{name}.{key}"].copy()).to("cpu" if key == "step" else parameter.device)
            for key in ("step", "exp_avg", "exp_avg_sq")
        }
