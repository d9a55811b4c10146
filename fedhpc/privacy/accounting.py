"""What a run costs in privacy, by dp_accounting's accountant of Rényi differential privacy.

Neighbours are two federations of which one has another device in the place of one of the other's. If that device is
sampled, its clipped vector gives way to another of at most the same length C, so that the sum moves by at most 2 C, and
noise of the deviation z C is z / 2 times what the sum can move; the count of short changes moves by at most 1, so that
its noise is its deviation times what it can move. dp_accounting's events take the noise in this unit: under
`REPLACE_ONE` it bounds the Gaussian's Rényi divergence of order alpha by alpha / (2 z'^2), which is that of two normal
distributions one unit of z' deviations apart, and both queries of a round are asked of the same sample.

Subsampled Rényi Differential Privacy and Analytical Moments Accountant. Wang, Balle, Kasiviswanathan. AISTATS 2019.
https://arxiv.org/abs/1808.00087, theorem 27.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedhpc.errors import ConfigError

LEAST_NOISE = 0.05
"""z below which nothing is protected, and above which calibration looks for one."""
NOISE_STEP = 1e-7
"""z is calibrated to this."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Who is asked in a round, and of what."""

    num_devices: int
    """N, that can be sampled."""
    sampled: int
    """m, without replacement."""
    with_count: bool
    """Whether a round also tells how many changes are short."""

    def count_noise(self, noise: float) -> float:
        """The deviation of the noise on that count: the paper's m / 20, but no less than ten times z / 2, where few
        devices a round would make the count cost more than a hundredth of the sum."""
        return max(self.sampled / 20, 10 * noise / 2)


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Of so many rounds with the same noise."""

    delta: float
    orders: NDArray[np.float64]
    """Of Rényi divergences."""
    divergences: NDArray[np.float64]
    """One round's, of each order; infinite without noise."""

    def epsilon(self, rounds: int) -> float:
        """What rounds in which something was released cost together."""
        if not rounds:
            return 0.0
        if not np.isfinite(self.divergences).any():
            return math.inf
        return float(_library().rdp.compute_epsilon(self.orders, rounds * self.divergences, self.delta)[0])


def costs(noise: float, sampling: Sampling, delta: float) -> Costs:
    """What rounds with the noise z cost.

    Raises:
        ConfigError: dp_accounting is not installed.
    """
    if not noise:
        return Costs(delta=delta, orders=np.ones(1), divergences=np.full(1, np.inf))
    accountant = _accountant().compose(_round(noise, sampling))
    return Costs(delta=delta, orders=accountant.orders, divergences=accountant.rdp)


def calibrate(epsilon: float, delta: float, sampling: Sampling, rounds: int) -> float:
    """The least z with which so many rounds cost no more than epsilon.

    Raises:
        ConfigError: there is none worth the name, or dp_accounting is not installed.
    """
    library = _library()
    try:
        return float(
            library.calibrate_dp_mechanism(
                _accountant,
                lambda noise: library.SelfComposedDpEvent(_round(noise, sampling), rounds),
                epsilon,
                delta,
                library.LowerEndpointAndGuess(LEAST_NOISE, 1.0),
                tol=NOISE_STEP,
            )
        )
    except library.mechanism_calibration.NoBracketIntervalFoundError:
        raise ConfigError(
            f"privacy.epsilon: {epsilon:g} over federation.rounds: {rounds} is what no noise z from {LEAST_NOISE:g} to "
            "1e9 costs; usual budgets lie between 1 and 10"
        ) from None


def _round(noise: float, sampling: Sampling) -> Any:
    library = _library()
    queries = [library.GaussianDpEvent(noise / 2)]
    if sampling.with_count:
        queries.append(library.GaussianDpEvent(sampling.count_noise(noise)))
    return library.SampledWithoutReplacementDpEvent(
        sampling.num_devices, sampling.sampled, library.ComposedDpEvent(queries)
    )


def _accountant() -> Any:
    library = _library()
    return library.rdp.RdpAccountant(neighboring_relation=library.NeighboringRelation.REPLACE_ONE)


def _library() -> Any:
    try:
        import dp_accounting  # noqa: PLC0415 - an extra, which takes a second to load
        import dp_accounting.rdp  # noqa: PLC0415
    except ImportError:
        raise ConfigError(
            "privacy: what a run costs is computed by the package dp-accounting, which is not installed: "
            "pip install 'fedhpc[privacy]'"
        ) from None
    return dp_accounting
