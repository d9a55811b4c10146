"""What changes a device's optimizer steps: the server method's rule, and FibecFed's sparse update.

Lists of tensors are in the order of the device's trainable parameters.
"""

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from fedhpc.checkpoint.device_state import FISHER
from fedhpc.config.sections import SparseConfig
from fedhpc.methods import LocalRule
from fedhpc.methods.updates import Vector
from fedhpc.tuning import Tuning


class Changes:
    """A method's rule on the exchanged parameters; layers that stay on the device step as they would."""

    def __init__(
        self,
        rule: LocalRule,
        tuning: Tuning,
        layers: tuple[int, ...],
        start: Vector,
        local: Vector,
        params: list[Tensor],
        device: int,
    ) -> None:
        def tensors(exchanged: Vector | float | None, elsewhere: Vector | float = 0.0) -> list[Tensor]:
            if exchanged is None:
                return []
            everywhere = np.broadcast_to(np.float32(exchanged), start.size)
            whole = tuning.merge(everywhere, np.broadcast_to(np.float32(elsewhere), local.size), layers)
            whole = tuning.on_device(whole, device)  # what a device does not have is not to move
            return [torch.from_numpy(tensor).to(p.device) for tensor, p in zip(whole.values(), params, strict=True)]

        self._pull = tensors(rule.proximal or None)
        self._start = tensors(start, local) if self._pull else []
        self._scale = tensors(None if rule.gradient_scale == 1 else rule.gradient_scale, elsewhere=1.0)
        self._shift, self._step_shift = tensors(rule.gradient_shift), tensors(rule.step_shift)

    def of_loss(self, gradients: list[Tensor], params: list[Tensor]) -> None:
        """Add the gradient of the proximal term."""
        if self._pull:
            torch._foreach_addcmul_(gradients, torch._foreach_sub(params, self._start), self._pull)

    def of_gradient(self, gradients: list[Tensor]) -> None:
        """Scale and shift clipped gradients."""
        if self._scale:
            torch._foreach_mul_(gradients, self._scale)
        if self._shift:
            torch._foreach_add_(gradients, self._shift)

    def of_step(self, params: list[Tensor], rate: float) -> None:
        """Go the rest of the step."""
        if self._step_shift:
            torch._foreach_add_(params, self._step_shift, alpha=-rate)


class Sparse:
    """Trains only the neurons, rows of the tensors, that have most Fisher information, in a device's own layers.

    Where these layers are frozen, or a tuning has tensors that stay as they are, it trains none of those.

    In a device's first round all of them are trained, and the diagonal Fisher information is measured.

    Its diagonal is approximated by a running mean of squares of each batch's mean gradient, before clipping. The
    empirical Fisher information has the mean of the examples' own squares; that would take a backward pass for each.

    FibecFed, https://arxiv.org/abs/2410.00131.
    """

    def __init__(
        self,
        config: SparseConfig,
        tuning: Tuning,
        layers: tuple[int, ...],
        known: Vector | None,
        params: Mapping[str, Tensor],
        measured: Mapping[str, Tensor],
    ) -> None:
        self._config, self._tuning, self._layers, self._known = config, tuning, layers, known
        self._measured: dict[str, Tensor] = {}
        self._mask: list[Tensor] = []
        if config.fraction == 1 or not tuning.local(layers).size:
            trained = tuning.trained()
        elif known is None:
            self._measured = {name: measured.get(name + FISHER, torch.zeros_like(p)) for name, p in params.items()}
            return
        else:
            exchanged = np.ones(tuning.exchanged(layers).size, np.float32)
            trained = tuning.merge(exchanged, self._most_informative(known), layers)
        if trained:
            self._mask = [torch.from_numpy(trained[name]).bool().to(p.device) for name, p in params.items()]
            self._start = [parameter.detach().clone() for parameter in params.values()]

    def of_gradient(self, gradients: list[Tensor]) -> None:
        """Measure, or leave out the other neurons' gradients."""
        momentum = self._config.momentum
        for total, gradient in zip(self._measured.values(), gradients, strict=False):
            total.mul_(momentum).addcmul_(gradient, gradient, value=1 - momentum)
        self.leave_out(gradients)

    def leave_out(self, gradients: list[Tensor]) -> None:
        """Zeros in place of the other neurons' gradients."""
        if self._mask:
            torch._foreach_mul_(gradients, self._mask)

    def of_step(self, params: list[Tensor]) -> None:
        """The other neurons stay where they are, whatever weight decay says."""
        for parameter, mask, start in zip(params, self._mask, self._start if self._mask else (), strict=False):
            parameter.copy_(torch.where(mask, parameter, start))

    def measured(self) -> dict[str, np.ndarray]:
        """What a stop within the first round has to keep."""
        return {name + FISHER: total.cpu().numpy() for name, total in self._measured.items()}

    def fisher(self) -> Vector | None:
        """The Fisher information of the device's own layers, once its first round is over."""
        if not self._measured:
            return self._known
        whole = {name: total.cpu().numpy() for name, total in self._measured.items()}
        return self._tuning.split(whole, self._layers)[1]

    def _most_informative(self, fisher: Vector) -> Vector:
        """1 for every element of the rows with most information, 0 for the others."""
        views = self._tuning.local(self._layers).views(fisher)
        rows = {name: view.sum(-1, keepdims=True) if view.ndim > 2 else view for name, view in views.items()}
        flat = np.concatenate([information.ravel() for information in rows.values()])
        chosen = np.zeros(flat.size, np.float32)
        chosen[np.argsort(-flat, kind="stable")[: math.ceil(self._config.fraction * flat.size - 1e-9)]] = 1
        parts = np.split(chosen, np.cumsum([information.size for information in rows.values()])[:-1])
        masks = {name: part.reshape(rows[name].shape) for name, part in zip(rows, parts, strict=True)}
        return self._tuning.local(self._layers).pack(masks)
