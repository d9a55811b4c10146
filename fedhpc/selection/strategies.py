"""Which layers' prompts are exchanged: scores, ranking, how many.

FedPepTAO, https://arxiv.org/abs/2310.15080, section 4.1; the released code's score of a layer: the divergence of its
hidden states' similarity spectrum over one batch.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedhpc.config import SelectionConfig
from fedhpc.errors import ConfigError
from fedhpc.seeding import generator

MAX_LAYERS = 256
"""A command names the layers in a mask of so many bits."""
EIGENVALUE_OFFSET = 1e-5
ROUNDING = 1e-6
"""Scores that differ by less, relative to the largest, are the same: hidden states are float32 at best."""
SCORED = ("score", "lowest_score", "sensitivity")
"""Strategies that rank the layers by what every device finds on one batch."""


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


def global_scores(scores: NDArray[np.float64], num_examples: NDArray[np.int64]) -> NDArray[np.float64]:
    """score(l) = sum over all devices of (n_i / N_examples) score_i(l), by ascending device; [N, L] -> [L]."""
    weights = num_examples / num_examples.sum()
    total = np.zeros(scores.shape[1])
    for weight, device_scores in zip(weights, scores, strict=True):
        total += weight * device_scores
    return total


def global_ratio(ratios: NDArray[np.float64], num_examples: NDArray[np.int64], by: str) -> float:
    """The devices' lossless ratios as one: `eigengap` weighs them by their examples, `density` (released) does not."""
    weights = num_examples if by == "eigengap" else np.ones_like(num_examples)
    return float(global_scores(ratios[:, None], weights)[0])


def describe_ratio(by: str, record: np.void) -> str:
    """What a device has found, in words."""
    if by == "density":
        why = f"mass above 0 {record['mass']:.3f}"
    else:
        width = "" if record["gap"] > 4 * record["lipschitz"] else ", the widest, is not"
        why = f"gap {record['gap']:.3g}{width} above 4 Lip = {4 * record['lipschitz']:.3g}"
    return f"device {record['device']}: {record['ratio']:.3f} ({why})"


def describe_spread(by: str, ratios: NDArray[np.float64]) -> str:
    """What all devices have found, in words."""
    spread = f"{ratios.min():.3f} to {ratios.max():.3f}, standard deviation {ratios.std():.3f}"
    return f"{by}; {spread} over {len(ratios)} devices"


def describe_tie(config: SelectionConfig, alike: Sequence[int], scores: NDArray[np.float64]) -> str:
    """What scores that do not decide mean, in words; see :func:`undecided_layers`."""
    return (
        f"selection.strategy: {config.strategy} does not tell layers {alike} apart, their score is "
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


def check_selection(config: SelectionConfig, num_layers: int) -> None:
    """Raise ConfigError where the configuration does not fit a backbone of L layers."""
    if num_layers > MAX_LAYERS:
        raise ConfigError(f"model.name: has {num_layers} layers; at most {MAX_LAYERS} can be exchanged")
    if config.strategy == "explicit":
        outside = [layer for layer in config.layers or [] if layer >= num_layers]
        if outside:
            raise ConfigError(f"selection.layers: {outside} not in the backbone; valid: 0 to {num_layers - 1}")
    elif config.strategy != "all" and config.ratio != "auto":
        num_selected(config.ratio, num_layers)


def undecided_layers(
    config: SelectionConfig, *, ratio: float, num_layers: int, scores: NDArray[np.float64]
) -> list[int]:
    """Layers of one score, to rounding, of which some are selected and some are not; none where scores decide."""
    count = num_selected(ratio, num_layers)
    if count == num_layers:
        return []
    rising = np.sort(scores)
    last = count if config.strategy == "lowest_score" else num_layers - count
    border = rising[last - 1]
    alike = np.abs(scores - border) <= ROUNDING * np.abs(scores).max()
    return np.flatnonzero(alike).tolist() if rising[last] - border <= ROUNDING * np.abs(scores).max() else []


def choose_layers(
    config: SelectionConfig, *, ratio: float, num_layers: int, seed: int, scores: NDArray[np.float64] | None
) -> tuple[int, ...]:
    """The selected layers S in ascending order; ties in score go to the lower index."""
    everything = range(num_layers)
    if config.strategy == "all":
        return tuple(everything)
    if config.strategy == "explicit":
        return tuple(sorted(config.layers or []))
    count = num_selected(ratio, num_layers)
    ranking: Sequence[int]
    if config.strategy == "first":
        ranking = everything
    elif config.strategy == "last":
        ranking = everything[::-1]
    elif config.strategy == "random":
        ranking = [int(layer) for layer in generator(seed, purpose="random layers").permutation(num_layers)]
    else:
        assert scores is not None
        sign = 1 if config.strategy == "lowest_score" else -1
        ranking = sorted(everything, key=lambda layer: (sign * scores[layer], layer))
    return tuple(sorted(ranking[:count]))


def _cosine(x: NDArray[np.float64]) -> NDArray[np.float64]:
    normalised = x / np.linalg.norm(x, axis=1, keepdims=True)
    return normalised @ normalised.T


def _from_distances(x: NDArray[np.float64], order: int) -> NDArray[np.float64]:
    distances = np.stack([np.linalg.norm(x - row, ord=order, axis=1) for row in x])
    return distances.max() - distances
