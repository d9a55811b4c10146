"""One device's local epochs: from the broadcast parameters to a DeviceUpdate."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fedhpc.config import Config
from fedhpc.data import Split
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
) -> DeviceUpdate:
    """E epochs of AdamW over a device's shard (design, section 4), from P^t and the device's own p_i."""
    params = as_parameters(tuning.merge(start, state.local, layers), backbone.torch_device)
    optimizer = torch.optim.AdamW(
        params.values(), lr=learning_rate(config, round_index), weight_decay=config.device.weight_decay
    )
    if state.moments is not None:
        _load_moments(optimizer, params, state.moments)
    losses: list[torch.Tensor] = []
    sizes: list[int] = []
    backbone.training_mode(True)
    for batch_examples in batches(config, examples, round_index=round_index, device=device):
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
        sizes.append(len(batch_examples))
    uploaded, local = tuning.split({name: p.detach().cpu().numpy() for name, p in params.items()}, layers)
    moments = None if config.device.reset_moments else _save_moments(optimizer, params)
    return DeviceUpdate(
        params=uploaded,
        num_examples=len(examples),
        num_steps=len(losses),
        loss=float(np.average(torch.stack(losses).double().cpu().numpy(), weights=sizes)),
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
