"""The score of a layer: the divergence of its hidden states' similarity spectrum over one batch.

FedPepTAO, https://arxiv.org/abs/2310.15080, section 4.1, as the released code computes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedhpc.config.sections import SelectionConfig
from fedhpc.registry import STRATEGIES
from fedhpc.selection.strategy import Strategy

if TYPE_CHECKING:
    from fedhpc.data.prepared import Batch
    from fedhpc.model.backbone import Backbone
    from fedhpc.tuning import Tuning

EIGENVALUE_OFFSET = 1e-5


class ScoredConfig(SelectionConfig):
    """Of strategies that score the layers on a batch."""

    batch_size: Annotated[int, Field(ge=2)] = 8
    """Examples that each device scores the layers on."""


@STRATEGIES.register("score")
class Score(Strategy):
    """The layers with the highest scores."""

    class Config(ScoredConfig):
        """Keys."""

        distance: Literal["cosine", "l1", "l2"] = "cosine"
        """Similarity of two examples' hidden states in a layer's score."""

    scored = True

    def score_layers(
        self, backbone: Backbone, tuning: Tuning, tensors: Mapping[str, np.ndarray], batch: Batch
    ) -> Sequence[float] | np.ndarray:
        """See `Strategy`."""
        outputs = backbone.layer_outputs(batch)
        return [layer_score(out.float().cpu().numpy(), self.config.distance) for out in outputs]


@STRATEGIES.register("lowest_score")
class LowestScore(Score):
    """The layers with the lowest scores, for comparison."""

    lowest_first = True


def layer_score(hidden: NDArray[np.floating], distance: str = "cosine") -> float:
    """Score of one layer on one batch: sum over sigma of (log sigma + 1/sigma).

    Args:
        hidden: hidden states after the layer [b, s, H], padding included.
        distance: `cosine`, or `l1`, `l2` (similarity = largest distance - distance).

    Raises:
        FloatingPointError: hidden states that are not finite.
    """
    x = np.asarray(hidden, np.float64).reshape(len(hidden), -1)
    if not np.isfinite(x).all():
        raise FloatingPointError(
            "selection.strategy: score cannot rank the layers: the backbone's hidden states are not finite; try "
            "another model.dtype"
        )
    similarity = _cosine(x) if distance == "cosine" else _from_distances(x, order=1 if distance == "l1" else 2)
    # Similarities from distances need not be positive semi-definite, and a logarithm wants a positive argument.
    sigma = np.maximum(np.linalg.eigvalsh(similarity), 0.0) + EIGENVALUE_OFFSET
    return float(np.sum(np.log(sigma) + 1.0 / sigma))


def _cosine(x: NDArray[np.float64]) -> NDArray[np.float64]:
    normalised = x / np.linalg.norm(x, axis=1, keepdims=True)
    return normalised @ normalised.T


def _from_distances(x: NDArray[np.float64], order: int) -> NDArray[np.float64]:
    distances = np.stack([np.linalg.norm(x - row, ord=order, axis=1) for row in x])
    return distances.max() - distances
