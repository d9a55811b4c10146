"""How many layers lose nothing: a device's ratio from the spectrum of its loss's Hessian with respect to the prompts.

FedPepTAO, https://arxiv.org/abs/2310.15080, section 4.1. Hessian-vector products, Lanczos with full
re-orthogonalisation; `eigengap` is the paper's rule, `density` the released code's (get_ratio.py, _get_ratio).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedhpc.data.prepared import Batch
from fedhpc.model.backbone import Backbone
from fedhpc.tuning import Tuning
from fedhpc.tuning.base import as_parameters

LANCZOS_STEPS = 50
BREAKDOWN = 1e-10
"""A Lanczos residual below this share of the largest coefficient means that an invariant subspace is found."""
POWER_STEPS = 10
"""Of the power iterations behind a Lipschitz constant: its order is wanted, not its digits."""
LIPSCHITZ_RADIUS = 0.1
"""Length of a displacement, as a share of the length of the parameters."""
GRID_POINTS = 10_000
GRID_MARGIN = 0.01
DENSITY_VARIANCE = 1e-5
FIRST_STEP = 0.1
FLAT_MASS = 0.005
FLAT_VALUES = 4

Flat = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Lossless:
    """What a device finds in the spectrum."""

    ratio: float
    """Share of the layers that it would exchange: in (0, 1], or 0 where `density` finds no positive curvature."""
    mass: float = math.nan
    """By `density`: share of the spectrum above 0."""
    gap: float = math.nan
    """By `eigengap`: the first gap that is wide enough, or the widest."""
    lipschitz: float = math.nan
    """By `eigengap`: Lip; a gap is wide enough above 4 Lip."""


def lossless_ratio(
    backbone: Backbone,
    tuning: Tuning,
    tensors: dict[str, np.ndarray],
    batch: Batch,
    *,
    by: str,
    rng: np.random.Generator,
    beat: Callable[[], None],
) -> Lossless:
    """How many of the layers a device would exchange, from one batch.

    Args:
        by: the rule, `eigengap` or `density`.
        beat: called before every gradient and product.

    Raises:
        FloatingPointError: a gradient or product that is not finite.
    """
    loss = BatchLoss(backbone, tuning, tensors, batch, beat)
    values, weights = lanczos(loss.hessian_product, rng.standard_normal(loss.size), steps=min(LANCZOS_STEPS, loss.size))
    if by == "density":
        return density_ratio(values, weights)
    return eigengap_ratio(values, weights, lipschitz_constant(loss, rng))


class BatchLoss:
    """The loss of one batch as a function of the trained per-layer parameters, as one float64 vector; others stay."""

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
        self.names = [name for name in tuning.per_layer if tuning.is_trained(name)]
        self.moved = [self.params[name] for name in self.names]
        self.size = sum(parameter.numel() for parameter in self.moved)
        self.norm = math.sqrt(sum(float(parameter.detach().double().square().sum()) for parameter in self.moved))

    def hessian_product(self, vector: Flat) -> Flat:
        """H(P) v, by differentiating the gradient's product with v."""
        return self._product(self._gradients, self.moved, vector)

    def hessian_at(self, displacement: Flat) -> Callable[[Flat], Flat]:
        """The same at P + d."""
        at = [
            (parameter.detach() + move).requires_grad_()
            for parameter, move in zip(self.moved, self._tensors(displacement), strict=True)
        ]
        gradients = self.gradients_at(at)
        return lambda vector: self._product(gradients, at, vector)

    def _product(self, gradients: list[torch.Tensor], at: list[torch.Tensor], vector: Flat) -> Flat:
        self.beat()
        product = torch.stack(
            [(gradient * v).sum() for gradient, v in zip(gradients, self._tensors(vector), strict=True)]
        ).sum()
        return self._flat(self.backbone.gradients(product, at, retain_graph=True))

    @cached_property
    def _gradients(self) -> list[torch.Tensor]:
        """grad F(P) with its graph, for all products."""
        return self.gradients_at(self.moved)

    def gradients_at(self, at: list[torch.Tensor]) -> list[torch.Tensor]:
        """grad F at other values of the per-layer parameters, with its graph."""
        self.beat()
        # The fused attention kernels have no second derivative; the plain one has.
        with sdpa_kernel(SDPBackend.MATH):
            return self.backbone.gradients(self._loss_at(at), at, create_graph=True)

    def _loss_at(self, at: list[torch.Tensor]) -> torch.Tensor:
        params = {**self.params, **dict(zip(self.names, at, strict=True))}
        return self.tuning.loss_terms(self.backbone, [params], self.batch, twice=True).mean()

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
    """Lip of B(d) = H(P) d - grad F(P + d): the largest |H(P + d) - H(P)| found for displacements d of one length.

    Of a supremum that random directions miss by orders of magnitude: d goes along the top eigenvector of H(P), both
    ways, and then along that of the largest difference so far.
    """
    length = LIPSCHITZ_RADIUS * loss.norm

    def difference(direction: Flat) -> tuple[float, Flat]:
        there = loss.hessian_at(length * direction)
        return top_eigenpair(lambda v: there(v) - loss.hessian_product(v), rng.standard_normal(loss.size))

    _, top = top_eigenpair(loss.hessian_product, rng.standard_normal(loss.size))
    found = [difference(top), difference(-top)]
    found.append(difference(max(found, key=lambda pair: pair[0])[1]))
    return max(size for size, _ in found)


def top_eigenpair(product: Callable[[Flat], Flat], start: Flat) -> tuple[float, Flat]:
    """The largest absolute eigenvalue of a symmetric operator, from below, and its vector of length 1."""
    vector, size = start / np.linalg.norm(start), 0.0
    for _ in range(POWER_STEPS):
        image = product(vector)
        size = float(np.linalg.norm(image))
        if size == 0:
            break
        vector = image / size
    return size, vector


def eigengap_ratio(values: Flat, weights: Flat, lipschitz: float) -> Lossless:
    """m / d for the first m with lambda_{m+1} - lambda_m > 4 Lip; 1 where no gap is so wide.

    The weights up to a gap between Ritz values estimate the share of the d eigenvalues that lie below it.
    """
    gaps = np.diff(values)
    wide = np.flatnonzero(gaps > 4 * lipschitz)
    ratio = float(weights[: wide[0] + 1].sum()) if len(wide) else 1.0
    gap = gaps[wide[0]] if len(wide) else gaps.max(initial=0.0)
    return Lossless(ratio=ratio, gap=float(gap), lipschitz=lipschitz)


def density_ratio(values: Flat, weights: Flat) -> Lossless:
    """Mass of the smoothed spectral density above a threshold that rises from 0 until the mass is flat.

    Flat: four successive masses within 0.005 of their neighbours. If before that a mass falls below half of that at 0,
    the threshold rises from 0 again with half the step. The density is a sum of Gaussians on a grid.
    """
    low, high = float(values[0]) - GRID_MARGIN, float(values[-1]) + GRID_MARGIN
    grid, width = np.linspace(low, high, GRID_POINTS, retstep=True)
    variance = max(DENSITY_VARIANCE * max(1.0, high - low), width**2)  # nothing between two points of the grid is lost
    density = sum(w * np.exp(-((grid - value) ** 2) / (2 * variance)) for value, w in zip(values, weights, strict=True))
    below = np.concatenate([[0.0], np.cumsum(density[:-1])]) / density.sum()

    def mass_above(threshold: float) -> float:
        return max(0.0, 1 - float(below[np.searchsorted(grid[1:], threshold, side="right")]))

    step, masses = FIRST_STEP, [mass_above(0.0)]
    while True:
        recent = masses[-FLAT_VALUES:]
        if len(recent) == FLAT_VALUES and np.abs(np.diff(recent)).max() < FLAT_MASS:
            return Lossless(ratio=recent[-1], mass=masses[0])
        masses.append(mass_above(step * len(masses)))
        if masses[-1] < masses[0] / 2:
            step, masses = step / 2, masses[:1]
