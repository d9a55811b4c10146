"""Clipping, noise and the clip that follows a quantile, by hand."""

import math

import numpy as np
import pytest

from fedhpc.config import section_of
from fedhpc.config.sections import PrivacyConfig
from fedhpc.methods import Population, ServerState, make_method
from fedhpc.methods.updates import RoundUploads, distance
from fedhpc.privacy.accounting import Sampling, costs
from fedhpc.privacy.clipping import next_clip, term
from fedhpc.privacy.mechanism import Mechanism
from fedhpc.registry import METHODS

STEPS, RATE = [2, 4, 6], 0.25
START = np.array([1.0, -2.0], np.float32)
MOVED = [START + np.float32([3.0, 4.0]), START + np.float32([0.0, 0.5])]
"""Of two devices: by 5, and by 0.5."""


def mechanism(noise=0.0, clip=1.0, sampled=2, seed=1, quantile=None):
    sampling = Sampling(num_devices=3, sampled=sampled, with_count=quantile is not None)
    return Mechanism(
        config=PrivacyConfig(clip=clip, noise=noise, quantile=quantile),
        seed=seed,
        devices=[0, 1, 2],
        sampling=sampling,
        noise=noise,
        costs=costs(0.0, sampling, 1e-5),
    )


def uploads_of(devices):
    ones = np.ones(len(devices), np.int64)
    return RoundUploads(
        device_ids=np.array(devices, np.int64),
        num_examples=ones,
        num_steps=np.array([STEPS[device] for device in devices]),
        params=[],
        device_learning_rate=RATE,
        counts=ones,
    )


def round_of(method, state, private, moved, devices):
    """The next state, the kept control variates and what is told, from where these devices have moved."""
    origin, terms, kept = method.origin(state.params), [], []
    for device, params in zip(devices, moved, strict=True):
        control = np.float32(0)
        change, new = method.change(state.params, params, control, num_steps=STEPS[device], learning_rate=RATE)
        with_flag = private.config.quantile is not None
        terms.append(term(change, origin, private.clip(state), with_flag=with_flag))
        kept.append(new)
    added = np.tile(np.sum(terms, axis=0, dtype=np.float64), (1 + method.needs_total, 1))
    uploads, told = private.release(uploads_of(devices), added, state, origin, STEPS)
    return private.after(method.update(state, uploads), told), kept, told


def make(**keys):
    return make_method(section_of(METHODS, **keys), Population(num_devices=3, sample_rate=0.7, total_count=3))


def test_fedavg_clips_how_far_devices_have_moved():
    """[3, 4] has the length 5: clipped to 1 it is [0.6, 0.8]; [0, 0.5] stays. Their mean is [0.3, 0.65]."""
    method = make(method="fedavg")
    state, _, _ = round_of(method, method.init(START), mechanism(), MOVED, [0, 1])
    np.testing.assert_allclose(state.params, START + np.array([0.3, 0.65]), atol=1e-6)


def test_drift_corrected_clips_mean_step_directions():
    """d_0 = -[3, 4] / (2 * 0.25) = -[6, 8], clipped to 1: -[0.6, 0.8]; d_1 = -[0, 0.5] / (4 * 0.25) = -[0, 0.5] stays.

    The step goes along their mean -[0.3, 0.65], over the mean of 3 steps of 0.25; c is their sum by all 3 devices, and
    what a device keeps is not clipped.
    """
    method = make(method="fedpeptao", learning_rate=1.0, momentum=0.0)
    state, kept, _ = round_of(method, method.init(START), mechanism(), MOVED, [0, 1])
    np.testing.assert_allclose(state.params, START + 3 * RATE * np.array([0.3, 0.65]), atol=1e-6)
    np.testing.assert_allclose(state.vectors["control_global"], [-0.2, -1.3 / 3], atol=1e-6)
    np.testing.assert_allclose(kept, [[-6, -8], [0, -0.5]], atol=1e-6)


@pytest.mark.parametrize("name", ["fedavg", "fedpeptao"])
def test_a_missing_device_adds_no_change_and_is_counted(name):
    method = make(method=name, **({"momentum": 0.0, "learning_rate": 1.0} if name == "fedpeptao" else {}))
    state, _, _ = round_of(method, method.init(START), mechanism(), MOVED[:1], [0])
    half = np.array([0.3, 0.4])
    expected = half if name == "fedavg" else STEPS[0] * RATE * half
    np.testing.assert_allclose(state.params, START + expected, atol=1e-6)


def test_nothing_is_longer_than_the_clip():
    """Also where float32 has few numbers near the parameters: rounded to the nearest one, 1 in 4 would be longer."""
    rng = np.random.default_rng(0)
    for scale in (1e-3, 1.0, 1e3, 1e6):
        origin = (scale * rng.standard_normal(500)).astype(np.float32)
        vector = origin + rng.standard_normal(500).astype(np.float32)
        assert distance(term(vector, origin, 1e-2, with_flag=False), origin) <= 1e-2
    assert distance(term(vector, vector + 1, math.inf, with_flag=False), vector) == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -3e38])
def test_what_is_no_number_is_no_change(value):
    vector = np.array([value, 0.0], np.float32)
    found = term(vector, START, 1.0, with_flag=True)
    assert found[-1] == 0
    assert distance(found[:2], START) <= 1
    if not math.isfinite(value):
        np.testing.assert_array_equal(found[:2], START)


def noise_of(count, *, noise=2.0, clip=0.5, round_index=0, **changes):
    private, zeros = mechanism(noise, clip, **changes), np.zeros(count, np.float32)
    state = ServerState(round=round_index, params=zeros)
    uploads, _ = private.release(uploads_of([0, 1]), np.zeros((2, count)), state, zeros, STEPS)
    return uploads


def test_the_noise_has_the_stated_deviation():
    """Of 10,000 draws it is known to 1 / sqrt(20,000) of it; both of a method's sums have the same noise."""
    uploads = noise_of(10_000)
    assert uploads.sums.total.std() == pytest.approx(2.0 * 0.5, rel=4 / math.sqrt(20_000))
    assert abs(uploads.sums.total.mean()) < 4 / math.sqrt(10_000)
    np.testing.assert_array_equal(uploads.sums.mean, uploads.sums.total / 2)


def test_the_noise_is_a_function_of_seed_and_round():
    first = noise_of(9).sums.total
    np.testing.assert_array_equal(noise_of(9).sums.total, first)
    for changes in ({"seed": 2}, {"round_index": 1}):
        assert not np.isclose(noise_of(9, **changes).sums.total, first).any()


def test_with_noise_the_steps_are_those_of_all_devices():
    """Whose steps were taken would tell who was sampled."""
    assert noise_of(3).num_steps.tolist() == [4, 4]
    assert noise_of(3, noise=0.0).num_steps.tolist() == STEPS[:2]


def test_the_clip_follows_its_quantile():
    """C exp(-0.2 (b - gamma)): Andrew et al. 2021, section 2.2, with their eta_C; the share is never beyond 0 and 1."""
    assert next_clip(2.0, 0.9, 0.5) == pytest.approx(2.0 * math.exp(-0.2 * 0.4))
    assert next_clip(2.0, 0.1, 0.5) == pytest.approx(2.0 * math.exp(0.2 * 0.4))
    assert next_clip(2.0, -7.0, 0.5) == pytest.approx(2.0 * math.exp(0.1))
    assert next_clip(2.0, 1e9, 0.25) == pytest.approx(2.0 * math.exp(-0.15))


def test_the_count_is_noised_and_decides_the_next_clip():
    """Without noise on the sum, that of the count has the deviation m / 20; a missing device leaves C as it is."""
    method = make(method="fedavg")
    private = mechanism(quantile=0.5)
    state, _, told = round_of(method, method.init(START), private, MOVED, [0, 1])
    noise = told["short_changes"] - 1 / 2
    assert 0 < abs(noise) < 5 / 20
    assert told["clip"] == 1.0
    assert state.scalars == {"clip": pytest.approx(math.exp(-0.2 * noise))}
    assert private.clip(state) == state.scalars["clip"]
    _, _, fewer = round_of(method, method.init(START), private, MOVED[:1], [0])
    assert fewer["short_changes"] == pytest.approx((0 + 0.5) / 2 + noise)
    draws = np.array(
        [
            mechanism(quantile=0.5, seed=seed, sampled=100).release(
                uploads_of([0]), np.array([[0.0, 0.0, 50.0]]), ServerState(round=0, params=START), START, STEPS
            )[1]["short_changes"]
            for seed in range(2000)
        ]
    )
    assert draws.std() == pytest.approx(1 / 20, rel=4 / math.sqrt(4000))
