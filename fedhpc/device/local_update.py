"""The devices' local epochs: from the broadcast parameters to DeviceUpdates, a pack of devices side by side."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim.adamw import adamw

from fedhpc.checkpoint.device_state import FISHER, DeviceState, Moments, UnfinishedUpdate
from fedhpc.config import Config
from fedhpc.data.prepared import Batch, Split
from fedhpc.device.step_rules import Changes, Sparse
from fedhpc.errors import CheckpointError, Halt
from fedhpc.federation.schedule import learning_rate
from fedhpc.methods.base import UNCHANGED, LocalRule
from fedhpc.methods.updates import Vector
from fedhpc.model.backbone import Backbone
from fedhpc.seeding import derive_seed, generator
from fedhpc.tuning import Tuning
from fedhpc.tuning.base import Params, as_parameters

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8
WINDOW = 4
"""Batches; with more of them texts of one length would meet again and again."""


@dataclass(frozen=True, kw_only=True)
class DeviceUpdate:
    """The outcome of a local update; `params`, `num_examples`, `num_steps` are uploaded."""

    params: Vector
    num_examples: int
    num_steps: int
    loss: float
    state: DeviceState
    gradient: Vector | None = None
    """Gradient of the whole shard at P^t; uploaded where the method asks for it."""


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """A device to be trained."""

    device: int
    state: DeviceState
    examples: NDArray[np.int64]
    """Its shard of the training split."""
    begun: UnfinishedUpdate | None = None
    """Go on with this update instead of beginning at P^t."""
    plan: list[NDArray[np.int64]] | None = None
    """The batches of its steps, where they do not follow from the seed."""
    rule: LocalRule = UNCHANGED
    """How the server's method changes this device's steps."""
    out: Vector | None = None
    """Memory for P_i; new memory if there is none."""
    begin: Vector | None = None
    """Where it begins; at P^t unless given."""


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
    with_gradient: bool = False,
    beat: Callable[[str], None] = lambda activity: None,
) -> Iterator[tuple[int, DeviceUpdate | UnfinishedUpdate]]:
    """E epochs of AdamW or SGD over each device's shard, from P^t and the device's own p_i.

    The first ``pack`` devices that are not done train together, in one forward and backward pass; when one is done the
    next takes its place. So what is computed together depends on the assignments alone.

    Args:
        with_gradient: whether the updates hold the gradients at P^t.
        beat: called with words on what happens before every step.

    Yields:
        Devices with their updates, as they are done; after a Halt those that are not.

    Raises:
        Halt: from `beat`, after all that was begun has been yielded.
    """
    waiting = [
        _Lane(config, backbone, tuning, layers, start, assignment, split, round_index) for assignment in assignments
    ]
    rate = learning_rate(config, round_index)
    backbone.training_mode(True)
    while waiting:
        lanes = waiting[:pack]
        try:
            if done := [lane for lane in lanes if lane.done]:
                for lane in done:
                    # A gradient that a stop interrupts is computed again; the steps are not taken again.
                    gradient = lane.gradient_at_start(backbone, split, beat) if with_gradient else None
                    waiting.remove(lane)
                    yield lane.device, lane.update(gradient)
                continue
            beat(f"training in round {round_index}: " + ", ".join(lane.activity for lane in lanes))
        except Halt:
            yield from ((lane.device, lane.unfinished()) for lane in waiting if lane.losses)
            raise
        _step(config, backbone, tuning, lanes, split, rate)


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
        split: Split,
        round_index: int,
    ) -> None:
        self.config, self.tuning, self.layers, self.round_index = config, tuning, layers, round_index
        self.device, self.state, self.examples = assignment.device, assignment.state, assignment.examples
        self.start, self.out, self.begin = start, assignment.out, assignment.begin
        self.plan = assignment.plan or batches(
            config, assignment.examples, split.lengths[self.examples], round_index=round_index, device=self.device
        )
        begun, place = assignment.begun, backbone.torch_device
        tensors = self._at_start()
        if begun:  # a file gives them in another order, and norms are rounded in the order of their terms
            tensors = {name: begun.tensors[name] for name in tensors}
        self.params = as_parameters(tensors, place)
        own = list(self.params.values())
        self.changes = Changes(assignment.rule, tuning, layers, start, self.state.local, own, self.device)
        moments = begun.moments if begun else self.state.moments
        self.moments = (
            {name: torch.tensor(moment, device=place) for name, moment in moments.items()}
            if moments is not None
            else {f"{name}.{key}": moment for name, p in self.params.items() for key, moment in _zeros(p)}
            if config.device.optimizer == "adamw"
            else {}
        )
        self.sparse = Sparse(config.sparse, tuning, layers, self.state.fisher, self.params, self.moments)
        self.losses = list(torch.tensor(begun.losses, device=place)) if begun else []
        self.num_terms = [split.num_terms[batch].sum() for batch in self.plan]
        """Terms of the loss in each step."""
        if len(self.losses) > len(self.plan):
            raise CheckpointError(f"device {self.device}: {len(self.losses)} steps taken of {len(self.plan)}")

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
            moments=self._moments() | self.sparse.measured(),
            losses=torch.stack(self.losses).cpu().numpy(),
        )

    def gradient_at_start(self, backbone: Backbone, split: Split, beat: Callable[[str], None]) -> Vector:
        """The gradient [n] of the mean loss over the whole shard at P^t, its norm clipped like a step's."""
        params = as_parameters(self._at_start(), backbone.torch_device)
        total, size = [torch.zeros_like(p) for p in params.values()], self.config.device.batch_size
        num_terms = split.num_terms[self.examples].sum()
        backbone.training_mode(True, dropout=False)
        for first in range(0, len(self.examples), size):
            beat(f"computing the gradient of device {self.device}")
            batch = split.batch(self.examples[first : first + size]).to(backbone.torch_device)
            losses = self.tuning.loss_terms(backbone, [params], batch)
            gradients = backbone.gradients(losses.sum() / num_terms, list(params.values()))
            torch._foreach_add_(total, gradients)
        backbone.training_mode(True)
        self.sparse.leave_out(total)
        _clip(total, self.config.device.max_grad_norm)
        whole = {name: gradient.cpu().numpy() for name, gradient in zip(params, total, strict=True)}
        return self.tuning.split(whole, self.layers)[0]

    def update(self, gradient: Vector | None) -> DeviceUpdate:
        uploaded, local = self.tuning.split(self._tensors(), self.layers, out=self.out)
        losses = torch.stack(self.losses).double().cpu().numpy()
        return DeviceUpdate(
            params=uploaded,
            num_examples=len(self.examples),
            num_steps=len(self.losses),
            loss=float(np.average(losses, weights=self.num_terms)),
            state=DeviceState(
                local=local,
                steps_taken=self.state.steps_taken + len(self.losses),
                moments=self._moments() if self.config.device.keeps_moments else None,
                fisher=self.sparse.fisher(),
                traces=self.state.traces,
            ),
            gradient=gradient,
        )

    def _at_start(self) -> dict[str, NDArray[np.float32]]:
        begin = self.start if self.begin is None else self.begin
        return self.tuning.on_device(self.tuning.merge(begin, self.state.local, self.layers), self.device)

    def _tensors(self) -> dict[str, NDArray[np.float32]]:
        return {name: parameter.detach().cpu().numpy() for name, parameter in self.params.items()}

    def _moments(self) -> Moments:
        return {name: moment.cpu().numpy() for name, moment in self.moments.items() if not name.endswith(FISHER)}


def batches(
    config: Config, examples: NDArray[np.int64], lengths: NDArray[np.int64], *, round_index: int, device: int
) -> list[NDArray[np.int64]]:
    """A device's batches of one round, in an order fixed by (seed, round, device); one of an epoch's may be short.

    Of more than `device.max_steps`, the first; those are others in each round.

    The texts of every WINDOW batches are sorted by length, so that those of a batch are about equally long. The
    batches then are shuffled: devices that all ended a round on short texts, or all on long ones, would not average
    out.

    Args:
        lengths: tokens of each example.
    """
    plan: list[NDArray[np.int64]] = []
    most = config.device.max_steps
    for epoch in range(config.device.epochs):
        if most is not None and len(plan) >= most:
            break
        rng = generator(config.seed, purpose=f"batch order {epoch}", round_index=round_index, device=device)
        plan += epoch_batches(examples, lengths, config.device.batch_size, rng)
    return plan[:most]


def epoch_batches(
    examples: NDArray[np.int64], lengths: NDArray[np.int64], size: int, rng: np.random.Generator
) -> list[NDArray[np.int64]]:
    """One epoch of `batches`."""
    plan, order = [], rng.permutation(len(examples))
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
    """One step of every lane: its own mean loss, gradient norm, rule and moments."""
    chosen = [lane.next_batch for lane in lanes]
    batch = split.batch(np.concatenate(chosen), [len(examples) for examples in chosen]).to(backbone.torch_device)
    seeds = [lane.dropout_seed for lane in lanes] if config.model.backbone_dropout or config.tuning.draws else None
    if config.model.backbone_dropout:
        torch.manual_seed(lanes[0].dropout_seed)
    losses, gradients = pack_gradients(backbone, tuning, [lane.params for lane in lanes], batch, seeds)
    params = [parameter for lane in lanes for parameter in lane.params.values()]
    ends = [0, *accumulate(len(lane.params) for lane in lanes)]
    with torch.no_grad():
        for lane, loss, first, end in zip(lanes, losses, ends, ends[1:], strict=False):
            lane.losses.append(loss)
            own = gradients[first:end]
            lane.sparse.of_gradient(own)
            lane.changes.of_loss(own, params[first:end])
            _clip(own, config.device.max_grad_norm)
            lane.changes.of_gradient(own)
            gradients[first:end] = own
        _optimize(config, lanes, params, gradients, rate)
        for lane, first, end in zip(lanes, ends, ends[1:], strict=False):
            lane.changes.of_step(params[first:end], rate)
            lane.sparse.of_step(params[first:end])


def pack_gradients(
    backbone: Backbone, tuning: Tuning, params: Sequence[Params], batch: Batch, dropout_seeds: Sequence[int] | None
) -> tuple[Tensor, list[Tensor]]:
    """Every device's mean loss [N] in a batch, and its gradients by the device's own parameters, one after the other.

    Arguments as those of `fedhpc.tuning.base.Tuning.forward`.
    """
    terms = tuning.loss_terms(backbone, params, batch, dropout_seeds=dropout_seeds)
    losses = torch.stack([part.mean() for part in terms.split(batch.terms)])
    return losses.detach(), backbone.gradients(losses.sum(), [p for own in params for p in own.values()])


def _clip(gradients: list[Tensor], max_norm: float) -> None:
    norm = torch.nn.utils.get_total_norm(gradients)
    torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))


def _optimize(
    config: Config, lanes: Sequence[_Lane], params: list[Tensor], gradients: list[Tensor], rate: float
) -> None:
    """AdamW with each lane's own moments, or SGD; weight decay is decoupled in both."""
    decay = config.device.weight_decay
    if config.device.optimizer == "sgd":
        torch._foreach_mul_(params, 1 - rate * decay)
        torch._foreach_add_(params, gradients, alpha=-rate)
        return
    adamw(
        params,
        gradients,
        [lane.moment(name, "exp_avg") for lane in lanes for name in lane.params],
        [lane.moment(name, "exp_avg_sq") for lane in lanes for name in lane.params],
        [],
        [lane.moment(name, "step") for lane in lanes for name in lane.params],
        fused=True,
        amsgrad=False,
        beta1=BETA1,
        beta2=BETA2,
        lr=rate,
        weight_decay=decay,
        eps=EPSILON,
        maximize=False,
    )


def _zeros(parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Adam's moments before the first step."""
    yield "exp_avg", torch.zeros_like(parameter)
    yield "exp_avg_sq", torch.zeros_like(parameter)
    yield "step", torch.zeros((), device=parameter.device)
