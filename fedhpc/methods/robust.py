"""Means that a few bad devices cannot move far, whatever they upload.

All of them need each upload by itself. But for the geometric median, every upload counts the same: what a device says
of its examples may be wrong, too.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, NonNegativeInt, PositiveInt

from fedhpc.config.sections import MethodConfig
from fedhpc.errors import ConfigError
from fedhpc.methods.base import Method, ServerState, f32, weighted_mean
from fedhpc.methods.updates import BLOCK, RoundUploads, Vector
from fedhpc.registry import METHODS

SMOOTHING = 1e-5
"""Distance below which an upload's weight no longer grows, and relative change of the objective at which RFA ends its
steps early; the released code's."""
CONVERGED = 1e-6


class RobustMethod(Method):
    """P^{t+1} is a mean of the uploads of some kind."""

    by_element = False
    """Whether each element of it is one that most uploads agree on."""

    @classmethod
    def check(cls, config: Any) -> None:
        """See `Method`; what most devices do not send would never change."""
        super().check(config)
        if cls.by_element and config.exchange.encoding == "topk":
            raise ConfigError(
                f"server.method: {config.server.method} goes by what most uploads say of an element, and with "
                "exchange.encoding: topk most of them say nothing; it needs dense"
            )

    def init(self, params: Vector) -> ServerState:
        """No state but the parameters."""
        return ServerState(round=0, params=params)

    def step(self, state: ServerState, uploads: RoundUploads) -> ServerState:
        """The mean is the result."""
        return replace(state, round=state.round + 1, params=f32(self.mean(uploads.in_device_order())))

    @abstractmethod
    def mean(self, uploads: RoundUploads) -> NDArray[np.float64]:
        """Of the uploads [n]."""


@METHODS.register("coordinate_median")
class CoordinateMedian(RobustMethod):
    """The median of every element.

    Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates. Yin, Chen, Ramchandran, Bartlett. ICML
    2018. https://arxiv.org/abs/1803.01498, algorithm 1, option I; there of gradients, here of P_i.
    """

    by_element = True

    def mean(self, uploads: RoundUploads) -> NDArray[np.float64]:
        """The median, of an even number of uploads the mean of the two in the middle."""
        found: NDArray[np.float64] = np.median(np.stack(uploads.params).astype(np.float64), axis=0)
        return found


class TrimmedMeanConfig(MethodConfig):
    """Of `trimmed_mean`."""

    trimmed: Annotated[float, Field(ge=0, lt=0.5)] = 0.1
    """beta, share of the uploads that is left out at each end, element by element; rounded down."""


@METHODS.register("trimmed_mean")
class TrimmedMean(RobustMethod):
    """The mean of every element without its largest and smallest values.

    Yin et al. as above, algorithm 1, option II.
    """

    Config = TrimmedMeanConfig
    by_element = True

    @classmethod
    def check(cls, config: Any) -> None:
        """See `RobustMethod`; nothing would be left out of too few uploads."""
        super().check(config)
        share, devices = config.server.trimmed, config.federation.devices_per_round
        if share > 0 and not _left_out(share, devices):
            enough = f"at least {math.ceil(1000 / devices) / 1000:g}"
            valid = enough if devices > 2 else "rounds of three devices or more"
            raise ConfigError(
                f"server.trimmed: {share:g} of {devices} devices a round is less than one, so none would be left out; "
                f"give 0, or {valid}"
            )

    def mean(self, uploads: RoundUploads) -> NDArray[np.float64]:
        """The mean of what is left."""
        ordered = np.sort(np.stack(uploads.params).astype(np.float64), axis=0)
        out = _left_out(self.config.trimmed, len(ordered))
        kept: NDArray[np.float64] = ordered[out : len(ordered) - out].mean(axis=0)
        return kept


def _left_out(share: float, count: int) -> int:
    """Uploads at each end."""
    return int(share * count + 1e-9)


class ReweightedMethod(RobustMethod):
    """A mean whose weights follow from how far the uploads are from each other."""

    def update(self, state: ServerState, uploads: RoundUploads) -> ServerState:
        """See `Method`; the weights first."""
        uploads = uploads.in_device_order()
        weights = self.reweigh(squared_distances(uploads.params), uploads.weights)
        return super().update(state, replace(uploads, counts=weights))

    def mean(self, uploads: RoundUploads) -> NDArray[np.float64]:
        """With these weights."""
        return weighted_mean(uploads)

    @abstractmethod
    def reweigh(self, squared: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """The uploads' weights [m], from their squared distances [m, m] and the weights that they had."""


class KrumConfig(MethodConfig):
    """Of `krum`."""

    bad: NonNegativeInt = 1
    """Uploads of a round that may be bad, f; a round needs 2 f + 3 devices."""
    kept: PositiveInt = 1
    """Uploads that the mean is of: one (Krum) or several (Multi-Krum)."""


@METHODS.register("krum")
class Krum(ReweightedMethod):
    """The mean of the uploads that are closest to their neighbours.

    Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent. Blanchard, El Mhamdi, Guerraoui, Stainer.
    NeurIPS 2017. https://arxiv.org/abs/1703.02757, section 4: an upload's score is the sum of the squared distances to
    the m - f - 2 others closest to it; there of gradients, here of P_i. Of equal scores the lower device id goes first.
    """

    Config = KrumConfig

    @classmethod
    def check(cls, config: Any) -> None:
        """See `Method`; what the paper proves needs m >= 2 f + 3."""
        super().check(config)
        server, devices = config.server, config.federation.devices_per_round
        if devices < 2 * server.bad + 3:
            raise ConfigError(
                f"server.bad: {server.bad} bad devices need rounds of at least {2 * server.bad + 3} devices, and "
                f"federation.sample_rate gives {devices}"
            )
        if server.kept > devices - server.bad:
            raise ConfigError(
                f"server.kept: {server.kept} of {devices} uploads, of which {server.bad} may be bad; valid: at most "
                f"{devices - server.bad}"
            )

    def reweigh(self, squared: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """Equal ones for those with the lowest scores."""
        count = len(squared)
        neighbours = max(1, count - self.config.bad - 2)  # fewer uploads may come than were asked for
        scores = np.sort(squared, axis=1)[:, 1 : 1 + neighbours].sum(axis=1)
        found = np.zeros(count)
        found[np.argsort(scores, kind="stable")[: self.config.kept]] = 1
        return found


class GeometricMedianConfig(MethodConfig):
    """Of `geometric_median`."""

    steps: PositiveInt = 4
    """Of Weiszfeld's algorithm in a round, at most."""


@METHODS.register("geometric_median")
class GeometricMedian(ReweightedMethod):
    """RFA: the point with the smallest sum of weighted distances to the uploads, by Weiszfeld's algorithm.

    Robust Aggregation for Federated Learning. Pillutla, Kakade, Harchaoui. IEEE Transactions on Signal Processing 2022.
    https://arxiv.org/abs/1912.13445, algorithm 2, with the constants of its code, https://github.com/krishnap25/RFA.
    The point is a mean of the uploads at every step, so that it is known by its weights.
    """

    Config = GeometricMedianConfig

    def reweigh(self, squared: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
        """Each weight divided by the distance, step by step."""
        found = weights
        distances = distances_from(found, squared)
        for _ in range(self.config.steps):
            before = weights @ distances
            found = weights / np.maximum(SMOOTHING, distances)
            found = found / found.sum()
            distances = distances_from(found, squared)
            now = weights @ distances
            if abs(before - now) < CONVERGED * now:
                break
        return found


def squared_distances(vectors: Sequence[Vector]) -> NDArray[np.float64]:
    """Of m vectors [n] from each other [m, m]."""
    squared = np.zeros((len(vectors), len(vectors)))
    for first in range(0, vectors[0].size, BLOCK):
        block = np.stack([vector[first : first + BLOCK] for vector in vectors]).astype(np.float64)
        for row, own in enumerate(block):
            squared[row, row + 1 :] += np.square(block[row + 1 :] - own).sum(axis=1)
    return squared + squared.T


def distances_from(weights: NDArray[np.float64], squared: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of m points from their weighted mean [m]: |p_j - sum_k w_k p_k|^2 = (S w)_j - w S w / 2."""
    to_all = (squared * weights).sum(axis=1)
    distances: NDArray[np.float64] = np.sqrt(np.maximum(0, to_all - (weights * to_all).sum() / 2))
    return distances
