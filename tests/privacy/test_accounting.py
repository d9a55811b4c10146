"""What rounds cost, beside dp_accounting's own accountant composed by hand."""

import math

import dp_accounting as dp
import numpy as np
import pytest
from dp_accounting.rdp import RdpAccountant

from fedhpc.privacy.accounting import Sampling, calibrate, costs

HALF = 0.5


def by_hand(multiplier, sampled, devices, rounds, delta):
    """Of so many rounds, of which each is a Gaussian with this noise on what it is sensitive to."""
    event = dp.SampledWithoutReplacementDpEvent(devices, sampled, dp.GaussianDpEvent(multiplier))
    accountant = RdpAccountant(neighboring_relation=dp.NeighboringRelation.REPLACE_ONE)
    return accountant.compose(event, rounds).get_epsilon(delta)


@pytest.mark.parametrize(
    ("noise", "sampled", "devices", "rounds", "delta", "with_count"),
    [
        (1.0, 10, 100, 100, 1e-5, False),
        (2.0, 10, 1000, 100, 1e-5, False),
        (4.0, 1, 1000, 500, 1e-6, False),
        (0.5, 50, 10_000, 10, 1e-7, False),
        (8.0, 100, 100, 30, 1e-3, False),
        (3.0, 7, 7, 1, 1e-2, False),
        (1.0, 10, 100, 100, 1e-5, True),
        (1.5, 400, 100_000, 300, 1e-6, True),
        (6.0, 20, 20, 10, 1e-3, True),
        (2.0, 30, 30, 3, 1e-4, True),
    ],
)
def test_costs_are_those_of_the_accountant(noise, sampled, devices, rounds, delta, with_count):
    """A sum that one device moves by 2 C, with noise z C; a count that it moves by 1."""
    sampling = Sampling(num_devices=devices, sampled=sampled, with_count=with_count)
    multiplier = HALF * noise
    if with_count:  # two Gaussians on one sample are one: Andrew et al. 2021, theorem 1
        deviation = max(sampled / 20, 5 * noise)
        multiplier = (multiplier**-2 + deviation**-2) ** -HALF
    found = costs(noise, sampling, delta).epsilon(rounds)
    assert found == pytest.approx(by_hand(multiplier, sampled, devices, rounds, delta), rel=1e-9)


def test_what_a_device_can_move_is_twice_the_clip():
    """Of all devices, that is the Gaussian's divergence: alpha (2 C)^2 / (2 (z C)^2); Mironov 2017, proposition 7."""
    noise, clip = 3.0, 0.7
    found = costs(noise, Sampling(num_devices=5, sampled=5, with_count=False), 1e-5)
    expected = found.orders * (2 * clip) ** 2 / (2 * (noise * clip) ** 2)
    np.testing.assert_allclose(found.divergences, expected, rtol=1e-12)


def test_no_round_costs_nothing_and_rounds_without_noise_have_no_bound():
    sampling = Sampling(num_devices=5, sampled=5, with_count=True)
    assert costs(1.0, sampling, 1e-5).epsilon(0) == 0
    assert costs(0.0, sampling, 1e-5).epsilon(0) == 0
    assert costs(0.0, sampling, 1e-5).epsilon(1) == math.inf


@pytest.mark.parametrize(
    ("epsilon", "sampled", "devices", "rounds", "with_count"),
    [(8.0, 10, 100, 1, False), (0.5, 20, 20, 10, False), (3.0, 20, 20, 40, True)],
)
def test_calibrated_noise_reaches_the_budget_and_does_not_pass_it(epsilon, sampled, devices, rounds, with_count):
    sampling = Sampling(num_devices=devices, sampled=sampled, with_count=with_count)
    spent = costs(calibrate(epsilon, 1e-5, sampling, rounds), sampling, 1e-5).epsilon(rounds)
    assert epsilon - 1e-3 < spent <= epsilon
