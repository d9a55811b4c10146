"""Which layers' tensors are exchanged: what a strategy is, and how many layers a ratio means."""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedhpc.config.sections import Part, SelectionConfig
from fedhpc.errors import ConfigError
from fedhpc.registry import STRATEGIES

if TYPE_CHECKING:
    from fedhpc.data.prepared import Batch
    from fedhpc.model.backbone import Backbone
    from fedhpc.tuning import Tuning

MAX_LAYERS = 256
"""A command names the layers in a mask of so many bits."""
ROUNDING = 1e-6
"""Scores that differ by less, relative to the largest, are the same: hidden states are float32 at best."""


class Strategy(Part, ABC):
    """One way to rank the layers: by scores that devices measure before round 0, or without."""

    Config: ClassVar[type[SelectionConfig]] = SelectionConfig
    needs_layers = True
    """Whether it selects some of the layers, so that the tuning must have tensors in them."""
    uses_ratio = True
    """Whether `selection.ratio` says how many."""
    scored = False
    """Whether every device scores the layers on one of its batches; see `score_layers`."""
    with_gradients = False
    """Whether the scores take the gradient of the loss."""
    lowest_first = False
    """Whether layers with low scores are selected."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def check_layers(self, num_layers: int) -> None:
        """Raise ConfigError where the configuration does not fit a backbone of L layers."""
        if num_layers > MAX_LAYERS:
            raise ConfigError(f"model.name: has {num_layers} layers; at most {MAX_LAYERS} can be exchanged")
        if self.uses_ratio and self.config.ratio != "auto":
            num_selected(self.config.ratio, num_layers)

    def score_layers(
        self, backbone: Backbone, tuning: Tuning, tensors: Mapping[str, np.ndarray], batch: Batch
    ) -> Sequence[float] | np.ndarray:
        """A device's scores [L] from one batch, where they are `scored`.

        Args:
            backbone: the frozen model.
            tuning: what is trained.
            tensors: all trainable tensors before round 0.
            batch: of the device's examples.

        Raises:
            FloatingPointError: the backbone's numbers are not finite.
        """
        raise NotImplementedError

    def rank(self, num_layers: int, seed: int, scores: NDArray[np.float64] | None) -> Sequence[int]:
        """All layers, those first that are selected first; of equal scores the lower index."""
        assert scores is not None
        sign = 1 if self.lowest_first else -1
        return sorted(range(num_layers), key=lambda layer: (sign * scores[layer], layer))

    def num_exchanged(self, num_layers: int) -> int:
        """How many layers are exchanged, as far as that is known before the run."""
        return num_layers if self.config.ratio == "auto" else num_selected(self.config.ratio, num_layers)

    def choose(
        self, *, ratio: float, num_layers: int, seed: int, scores: NDArray[np.float64] | None
    ) -> tuple[int, ...]:
        """The selected layers S in ascending order."""
        return tuple(sorted(self.rank(num_layers, seed, scores)[: num_selected(ratio, num_layers)]))

    def undecided_layers(self, *, ratio: float, num_layers: int, scores: NDArray[np.float64]) -> list[int]:
        """Layers of one score, to rounding, of which some are selected and some are not; none where scores decide."""
        count = num_selected(ratio, num_layers)
        if count == num_layers:
            return []
        rising = np.sort(scores)
        last = count if self.lowest_first else num_layers - count
        border = rising[last - 1]
        alike = np.abs(scores - border) <= ROUNDING * np.abs(scores).max()
        return np.flatnonzero(alike).tolist() if rising[last] - border <= ROUNDING * np.abs(scores).max() else []

    def describe_tie(self, alike: Sequence[int], scores: NDArray[np.float64]) -> str:
        """What scores that do not decide mean, in words; see `undecided_layers`."""
        return (
            f"selection.strategy: {self.config.strategy} does not tell layers {list(alike)} apart, their score is "
            f"{scores[alike[0]]:.6g}; those with the lower index are exchanged first"
        )


def num_selected(ratio: float, num_layers: int) -> int:
    """How many of L layers a ratio selects: the whole part of ratio * L."""
    count = int(ratio * num_layers + 1e-9)
    if count < 1:
        smallest = math.ceil(1000 / num_layers) / 1000
        raise ConfigError(
            f"selection.ratio: {ratio} of {num_layers} layers selects no layer; valid: {smallest} to 1, or auto"
        )
    return count


def global_scores(scores: NDArray[np.float64], num_examples: NDArray[np.int64]) -> NDArray[np.float64]:
    """score(l) = sum over all devices of (n_i / N_examples) score_i(l), by ascending device; [N, L] -> [L]."""
    weights = num_examples / num_examples.sum()
    total = np.zeros(scores.shape[1])
    for weight, device_scores in zip(weights, scores, strict=True):
        total += weight * device_scores
    return total


def make_strategy(config: SelectionConfig) -> Strategy:
    """The strategy that a configuration's section `selection` names."""
    strategy: Strategy = STRATEGIES[config.strategy](config)
    return strategy
