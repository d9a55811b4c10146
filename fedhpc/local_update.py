"""The devices' local epochs: from the broadcast parameters to DeviceUpdates, a pack of devices side by side."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim.adamw import adamw

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
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8
WINDOW = 4
"""Batches; with more of them texts of one length would meet again and again."""


@dataclass(frozen=True, kw_only=True)
class DeviceState:
    """What a device keeps between its rounds; it never leaves the devices' ranks but for a checkpoint."""

    local: Vector
    """p_i, tensors of the layers that are not exchanged."""
    steps_taken: int = 0
    moments: Moments | None = None
    """Only with `device.reset_moments: false`."""
    kept: dict[str, Vector] = field(default_factory=dict)
    """What is left of its uploads, in the layout of the exchanged tensors: see :class:`fedhpc.encoding.Encoding`."""

    def narrowed(self, kept_elements: NDArray[np.intp], unseen_local: Vector) -> "DeviceState":
        """The state after layers have left the exchange; their tensors start anew."""
        kept = {name: vector[kept_elements] for name, vector in self.kept.items()}
        return replace(self, local=unseen_local, kept=kept)


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


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """A device to be trained."""

    device: int
    state: DeviceState
    examples: NDArray[np.int64]
    """Its shard of the training split."""
    begun: UnfinishedUpdate | None = None
    """Go on with this update instead of beginning at P^t."""


def learning_rate(config: Config, round_index: int) -> float:
    """eta of a round; `linear` falls to zero over the whole run, in steps of one round."""
    if config.device.schedule == "constant":
        return config.device.learning_rate
    return config.device.learning_rate * (1 - round_index / config.federation.rounds)


def local_updates(
    config: Config,
    backbone: Backbone,
    tuning: Tuning,
    layers: tuple[int, ...],
    *,
    start: Vector,
    assignments: Sequence[Assignment],
    split: Split,
    round_index: int,
    pack: int = 1,
    beat: Callable[[str], None] = lambda activity: None,
) -> Iterator[tuple[int, DeviceUpdate | UnfinishedUpdate]]:
    """E epochs of AdamW over each device's shard (design, section 4), from P^t and the device's own p_i.

    The first ``pack`` devices that are not done train together, in one forward and backward pass; when one is done the
    next takes its place. So what is computed together depends on the assignments alone.

    Args:
        beat: called with words on what happens before every step.

    Yields:
        Devices with their updates, as they are done; after a Halt those that are not.

    Raises:
        Halt: from `beat`, after all that was begun has been yielded.
    """
    lengths = split.lengths
    waiting = [
        _Lane(config, backbone, tuning, layers, start, assignment, lengths[assignment.examples], round_index)
        for assignment in assignments
    ]
    rate = learning_rate(config, round_index)
    backbone.training_mode(True)
    while waiting:
        lanes = waiting[:pack]
        try:
            beat(f"training in round {round_index}: " + ", ".join(lane.activity for lane in lanes))
        except Halt:
            yield from ((lane.device, lane.unfinished()) for lane in waiting if lane.losses)
            raise
        _step(config, backbone, tuning, lanes, split, rate)
        for lane in lanes:
            if lane.done:
                waiting.remove(lane)
                yield lane.device, lane.update()


class _Lane:
    """One device's update under way."""

    def __init__(
        self,
        config: Config,
        backbone: Backbone,
        tuning: Tuning,
        layers: tuple[int, ...],
        start: Vector,
        assignment: Assignment,
        lengths: NDArray[np.int64],
        round_index: int,
    ) -> None:
        self.config, self.tuning, self.layers, self.round_index = config, tuning, layers, round_index
        self.device, self.state, self.num_examples = assignment.device, assignment.state, len(assignment.examples)
        self.plan = batches(config, assignment.examples, lengths, round_index=round_index, device=assignment.device)
        begun, place = assignment.begun, backbone.torch_device
        tensors = begun.tensors if begun else tuning.merge(start, self.state.local, layers)
        self.params = as_parameters(tensors, place)
        moments = begun.moments if begun else self.state.moments
        self.moments = (
            {name: torch.tensor(moment, device=place) for name, moment in moments.items()}
            if moments is not None
            else {f"{name}.{key}": moment for name, p in self.params.items() for key, moment in _zeros(p)}
        )
        self.losses = list(torch.tensor(begun.losses, device=place)) if begun else []

    @property
    def activity(self) -> str:
        return f"device {self.device} step {len(self.losses) + 1} of {len(self.plan)}"

    @property
    def done(self) -> bool:
        return len(self.losses) == len(self.plan)

    @property
    def next_batch(self) -> NDArray[np.int64]:
        return self.plan[len(self.losses)]

    @property
    def dropout_seed(self) -> int:
        purpose = f"dropout {len(self.losses)}"
        return derive_seed(self.config.seed, purpose=purpose, round_index=self.round_index, device=self.device)

    def moment(self, name: str, key: str) -> Tensor:
        return self.moments[f"{name}.{key}"]

    def unfinished(self) -> UnfinishedUpdate:
        return UnfinishedUpdate(
            tensors=self._tensors(),
            moments=self._moments(),
            losses=torch.stack(self.losses).cpu().numpy(),
        )

    def update(self) -> DeviceUpdate:
        uploaded, local = self.tuning.split(self._tensors(), self.layers)
        losses = torch.stack(self.losses).double().cpu().numpy()
        return DeviceUpdate(
            params=uploaded,
            num_examples=self.num_examples,
            num_steps=len(self.losses),
            loss=float(np.average(losses, weights=[len(batch) for batch in self.plan])),
            state=DeviceState(
                local=local,
                steps_taken=self.state.steps_taken + len(self.losses),
                moments=None if self.config.device.reset_moments else self._moments(),
            ),
        )

    def _tensors(self) -> dict[str, NDArray[np.float32]]:
        return {name: parameter.detach().cpu().numpy() for name, parameter in self.params.items()}

    def _moments(self) -> Moments:
        return {name: moment.cpu().numpy() for name, moment in self.moments.items()}


def batches(
    config: Config, examples: NDArray[np.int64], lengths: NDArray[np.int64], *, round_index: int, device: int
) -> list[NDArray[np.int64]]:
    """A device's batches of one round, in an order fixed by (seed, round, device); one of an epoch's may be short.

    The texts of every WINDOW batches are sorted by length, so that those of a batch are about equally long. The
    batches then are shuffled: devices that all ended a round on short texts, or all on long ones, would not average
    out.

    Args:
        lengths: tokens of each example.
    """
    size, plan = config.device.batch_size, []
    for epoch in range(config.device.epochs):
        rng = generator(config.seed, purpose=f"batch order {epoch}", round_index=round_index, device=device)
        order = rng.permutation(len(examples))
        for window in np.split(order, range(WINDOW * size, len(order), WINDOW * size)):
            by_length = window[np.argsort(lengths[window], kind="stable")]
            sizes = np.full(-(-len(window) // size), size)
            sizes[rng.integers(len(sizes))] -= sizes.sum() - len(window)
            parts = np.split(examples[by_length], np.cumsum(sizes)[:-1])
            plan += [parts[place] for place in rng.permutation(len(parts))]
    return plan


def _step(
    config: Config, backbone: Backbone, tuning: Tuning, lanes: Sequence[_Lane], split: Split, rate: float
) -> None:
    """One step of every lane: its own mean loss, its own gradient norm, its own moments."""
    chosen = [lane.next_batch for lane in lanes]
    batch = split.batch(np.concatenate(chosen), [len(examples) for examples in chosen]).to(backbone.torch_device)
    seeds = [lane.dropout_seed for lane in lanes] if config.model.backbone_dropout or config.tuning.dropout else None
    if config.model.backbone_dropout:
        torch.manual_seed(lanes[0].dropout_seed)
    scores = tuning.forward(backbone, [lane.params for lane in lanes], batch, dropout_seeds=seeds)
    losses = torch.stack([part.mean() for part in tuning.losses(scores, batch.labels).split(batch.sizes)])
    params = [parameter for lane in lanes for parameter in lane.params.values()]
    gradients = torch.autograd.grad(losses.sum(), params)
    ends = [0, *accumulate(len(lane.params) for lane in lanes)]
    with torch.no_grad():
        for lane, loss, first, end in zip(lanes, losses.detach(), ends, ends[1:], strict=False):
            lane.losses.append(loss)
            norm = torch.nn.utils.get_total_norm(gradients[first:end])
            scale = (config.device.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(gradients[first:end], scale)
        adamw(
            params,
            list(gradients),
            [lane.moment(name, "exp_avg") for lane in lanes for name in lane.params],
            [lane.moment(name, "exp_avg_sq") for lane in lanes for name in lane.params],
            [],
            [lane.moment(name, "step") for lane in lanes for name in lane.params],
            fused=True,
            amsgrad=False,
            beta1=BETA1,
            beta2=BETA2,
            lr=rate,
            weight_decay=config.device.weight_decay,
            eps=EPSILON,
            maximize=False,
        )


def _zeros(parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Adam's moments before the first step."""
    yield "exp_avg", torch.zeros_like(parameter)
    yield "exp_avg_sq", torch.zeros_like(parameter)
    yield "step", torch.zeros((), device=parameter.device)
