"""How many layers lose nothing: a device's ratio from the spectrum of its loss's Hessian with respect to the prompts.

FedPepTAO, https://arxiv.org/abs/2310.15080, section 4.1. Hessian-vector products, Lanczos with full
re-orthogonalisation; `eigengap` is the paper's rule, `density` the released code's.
"""

import math
from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedhpc.data import Batch
from fedhpc.models import Backbone
from fedhpc.tuning import Tuning
from fedhpc.tuning.base import as_parameters

LANCZOS_STEPS = 50
BREAKDOWN = 1e-10
"""A Lanczos residual below this share of the largest coefficient means that an invariant subspace is found."""
LIPSCHITZ_PROBES = 4
LIPSCHITZ_RADIUS = 0.1
"""Length of a probe's displacement, as a share of the length of the parameters."""
DENSITY_VARIANCE = 1e-5
FLAT_MASS = 0.005
FLAT_VALUES = 4
FIRST_STEPS = 20
"""The density rule's first step is this part of the way from 0 to the largest eigenvalue."""
MOST_STEPS = 1000

Flat = NDArray[np.float64]


def lossless_ratio(
    backbone: Backbone,
    tuning: Tuning,
    tensors: dict[str, np.ndarray],
    batch: Batch,
    *,
    by: str,
    rng: np.random.Generator,
    beat: Callable[[], None],
) -> float:
    """Share of the layers that a device would exchange, from one batch: in (0, 1], or 0 where `density` finds no
    positive curvature.

    Args:
        by: the rule, `eigengap` or `density`.
        beat: called before every gradient and product.

    Raises:
        FloatingPointError: a gradient or product that is not finite.
    """
    loss = BatchLoss(backbone, tuning, tensors, batch, beat)
    start = rng.standard_normal(loss.size)
    lipschitz = lipschitz_constant(loss, rng) if by == "eigengap" else 0.0
    values, weights = lanczos(loss.hessian_product, start, steps=min(LANCZOS_STEPS, loss.size))
    return density_ratio(values, weights) if by == "density" else eigengap_ratio(values, lipschitz)


class BatchLoss:
    """The loss of one batch as a function of the per-layer parameters, as one float64 vector; shared ones stay."""

    def __init__(
        self,
        backbone: Backbone,
        tuning: Tuning,
        tensors: dict[str, np.ndarray],
        batch: Batch,
        beat: Callable[[], None],
    ) -> None:
        self.backbone, self.tuning, self.batch, self.beat = backbone, tuning, batch, beat
        self.params = as_parameters(tensors, backbone.torch_device)
        self.moved = [self.params[name] for name in tuning.per_layer]
        self.size = sum(parameter.numel() for parameter in self.moved)
        self.norm = math.sqrt(sum(float(parameter.detach().double().square().sum()) for parameter in self.moved))

    def gradient(self, displacement: Flat) -> Flat:
        """grad F(P + d)."""
        self.beat()
        at = [
            (parameter.detach() + move).requires_grad_()
            for parameter, move in zip(self.moved, self._tensors(displacement), strict=True)
        ]
        return self._flat(self.backbone.gradients(self._loss_at(at), at))

    def hessian_product(self, vector: Flat) -> Flat:
        """H(P) v, by differentiating the gradient's product with v."""
        self.beat()
        product = torch.stack(
            [(gradient * v).sum() for gradient, v in zip(self._gradients, self._tensors(vector), strict=True)]
        ).sum()
        return self._flat(self.backbone.gradients(product, self.moved, retain_graph=True))

    @cached_property
    def _gradients(self) -> list[torch.Tensor]:
        """grad F(P) with its graph, for all products."""
        # The fused attention kernels have no second derivative; the plain one has.
        with sdpa_kernel(SDPBackend.MATH):
            return self.backbone.gradients(self._loss_at(self.moved), self.moved, create_graph=True)

    def _loss_at(self, at: list[torch.Tensor]) -> torch.Tensor:
        params = {**self.params, **dict(zip(self.tuning.per_layer, at, strict=True))}
        scores = self.tuning.forward(self.backbone, [params], self.batch)
        return self.tuning.losses(scores, self.batch.labels).mean()

    def _tensors(self, flat: Flat) -> list[torch.Tensor]:
        parts = torch.from_numpy(flat).float().to(self.backbone.torch_device).split([p.numel() for p in self.moved])
        return [part.view_as(parameter) for part, parameter in zip(parts, self.moved, strict=True)]

    @staticmethod
    def _flat(tensors: Sequence[torch.Tensor]) -> Flat:
        flat = torch.cat([tensor.detach().flatten() for tensor in tensors]).double().cpu().numpy()
        if not np.isfinite(flat).all():
            raise FloatingPointError(
                "selection.ratio: auto finds no ratio: a batch's loss has a gradient or curvature that is not finite; "
                "try another model.dtype"
            )
        return flat


def lanczos(product: Callable[[Flat], Flat], start: Flat, *, steps: int) -> tuple[Flat, Flat]:
    """Ritz values ascending and their weights (squared first components, sum 1) of a symmetric operator."""
    basis = np.empty((steps, start.size))
    basis[0] = start / np.linalg.norm(start)
    diagonal: list[float] = []
    off_diagonal: list[float] = []
    while True:
        done = len(diagonal) + 1
        known = basis[:done]
        w = product(known[-1])
        diagonal.append(float(w @ known[-1]))
        for _ in range(2):  # once is not enough in finite precision
            w = w - known.T @ (known @ w)
        beta = float(np.linalg.norm(w))
        if len(diagonal) == steps or beta <= BREAKDOWN * max(map(abs, diagonal + off_diagonal)):
            break
        off_diagonal.append(beta)
        basis[done] = w / beta
    values, vectors = np.linalg.eigh(np.diag(diagonal) + np.diag(off_diagonal, 1) + np.diag(off_diagonal, -1))
    return values, vectors[0] ** 2


def lipschitz_constant(loss: BatchLoss, rng: np.random.Generator) -> float:
    """Lip of B(d) = H(P) d - grad F(P + d), estimated as the largest |B(d) - B(0)| / |d| over random displacements."""
    length = LIPSCHITZ_RADIUS * loss.norm
    directions = [rng.standard_normal(loss.size) for _ in range(LIPSCHITZ_PROBES)]
    displacements = [direction * (length / np.linalg.norm(direction)) for direction in directions]
    # Gradients first: from the first product on there is its graph in memory, too.
    at_zero = loss.gradient(np.zeros(loss.size))
    gradients = [loss.gradient(displacement) for displacement in displacements]
    changes = [
        loss.hessian_product(displacement) - gradient + at_zero
        for displacement, gradient in zip(displacements, gradients, strict=True)
    ]
    return max(float(np.linalg.norm(change)) for change in changes) / length


def eigengap_ratio(values: Flat, lipschitz: float) -> float:
    """m / (number of eigenvalues) for the first m with lambda_{m+1} - lambda_m > 4 Lip; 1 where no gap is so wide."""
    wide = np.flatnonzero(np.diff(values) > 4 * lipschitz)
    return float((wide[0] + 1) / len(values)) if len(wide) else 1.0


def density_ratio(values: Flat, weights: Flat) -> float:
    """Mass of the smoothed spectral density above a threshold that rises from 0 until the mass is flat.

    Flat: four successive values within 0.005. The step is halved whenever the mass falls below half of its start.
    """
    sigma = math.sqrt(DENSITY_VARIANCE * max(1.0, float(values[-1] - values[0])))

    def mass_above(threshold: float) -> float:
        above = [0.5 * math.erfc((threshold - value) / (sigma * math.sqrt(2))) for value in values]
        return float(np.dot(weights, above))

    threshold, step = 0.0, max(float(values[-1]), sigma) / FIRST_STEPS
    masses = [mass_above(threshold)]
    for _ in range(MOST_STEPS):
        recent = masses[-FLAT_VALUES:]
        if len(recent) == FLAT_VALUES and max(recent) - min(recent) <= FLAT_MASS:
            break
        mass = mass_above(threshold + step)
        if mass < masses[0] / 2:
            step /= 2
            continue
        threshold += step
        masses.append(mass)
    return masses[-1]
