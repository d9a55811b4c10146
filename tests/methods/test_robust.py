"""Means that a few bad devices cannot move far: by hand, and by their definitions."""

import re

import numpy as np
import pytest
from test_methods import P0, method, uploads

from fedhpc.config import Config, least_values
from fedhpc.methods.robust import distances_from, squared_distances

GOOD = [[0, 1], [1, 0], [1, 1], [0, 0]]
FAR = [1e6, -1e6]


def after(params, examples=None, **config):
    """The parameters after a round in which devices 0, 1, ... sent these."""
    chosen, count = method(**config), len(params)
    sent = uploads(params, ids=range(count), examples=examples or [1] * count, steps=[2] * count)
    return chosen.update(chosen.init(P0), sent).params


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ([[0, 5], [3, 1], [9, 2]], [3, 2]),
        ([[0, 5], [3, 1], [9, 2], [4, 8]], [3.5, 3.5]),  # of four, between the two in the middle
    ],
)
def test_the_median_of_each_element(params, expected):
    assert after(params, method="coordinate_median", examples=range(1, len(params) + 1)).tolist() == expected


def test_the_mean_without_the_largest_and_the_smallest_of_each_element():
    params = [[0, 9], [1, 8], [2, 7], [3, 100], [-50, 6]]
    # a fifth of five is one at each end: of 0, 1, 2 and of 9, 8, 7
    assert after(params, method="trimmed_mean", trimmed=0.2).tolist() == [1, 8]
    # 0.3 of five is 1.5, rounded down
    assert after(params, method="trimmed_mean", trimmed=0.3).tolist() == [1, 8]
    assert after(params, method="trimmed_mean", trimmed=0.0) == pytest.approx([-44 / 5, 26])


@pytest.mark.parametrize("devices", [3, 6, 9])
def test_the_least_share_is_one_that_leaves_something_out(devices):
    def config(share):
        federation = {"num_devices": devices, "sample_rate": 1.0}
        server = {"method": "trimmed_mean", "trimmed": share}
        return Config.model_validate({**least_values(), "federation": federation, "server": server})

    with pytest.raises(ValueError, match="give 0, or at least") as refused:
        config(0.01)
    assert config(float(re.findall(r"at least ([.\d]+)", str(refused.value))[0]))


@pytest.mark.parametrize("method", ["coordinate_median", "trimmed_mean"])
def test_the_largest_changes_alone_have_no_median(method):
    """Of 100 elements each device sends one, and of what four of five do not send the median is no change."""
    federation = {"num_devices": 20, "sample_rate": 1.0}
    sections = {"federation": federation, "server": {"method": method}, "exchange": {"encoding": "topk"}}
    with pytest.raises(ValueError, match="it needs dense"):
        Config.model_validate({**least_values(), **sections})


def test_krum_takes_the_upload_closest_to_its_neighbours():
    params = [[0, 0], [1, 0], [3, 0], [7, 0], [20, 0]]
    # m = 5, f = 1: scores are the two smallest squared distances: 1 + 9, 1 + 4, 4 + 9, 16 + 36, 169 + 289
    assert after(params, method="krum", bad=1).tolist() == [1, 0]
    # Multi-Krum: the mean of the lowest two scores, 5 and 10
    assert after(params, method="krum", bad=1, kept=2, examples=[9, 1, 1, 1, 1]).tolist() == [0.5, 0]


def test_krum_takes_the_first_of_equals():
    assert after([[0, 0], [2, 0], [4, 0], [6, 0], [8, 0]], method="krum", bad=1).tolist() == [2, 0]
    assert after([[5, 5]] * 5, method="krum", bad=1).tolist() == [5, 5]


def weiszfeld(points, alphas, steps):
    """Algorithm 2 of RFA on the points themselves."""
    points, alphas = np.array(points, float), np.array(alphas, float) / np.sum(alphas)
    at = alphas @ points
    for _ in range(steps):
        weights = alphas / np.maximum(1e-5, np.linalg.norm(points - at, axis=1))
        at = weights @ points / weights.sum()
    return at


@pytest.mark.parametrize("steps", [1, 4])
def test_the_geometric_median_is_that_of_weiszfelds_steps(steps):
    params, examples = [*GOOD, [30, 40]], [1, 2, 3, 4, 5]
    found = after(params, method="geometric_median", steps=steps, examples=examples)
    assert found == pytest.approx(weiszfeld(params, examples, steps), rel=1e-6)


def test_the_geometric_median_of_a_line_is_its_weighted_median():
    found = after([[0, 0], [1, 0], [2, 0], [50, 0], [90, 0]], method="geometric_median", steps=500)
    assert found == pytest.approx([2, 0], abs=1e-3)


@pytest.mark.parametrize(
    "config",
    [
        {"method": "coordinate_median"},
        {"method": "trimmed_mean", "trimmed": 0.2},
        {"method": "krum", "bad": 1},
        {"method": "geometric_median", "steps": 50},
    ],
    ids=lambda config: config["method"],
)
def test_one_bad_upload_of_five_moves_none_of_them_far(config):
    honest, attacked = (after([*GOOD, last], **config) for last in ([1, 1], FAR))
    assert np.abs(attacked - honest).max() <= 1.5
    assert np.abs(after([*GOOD, FAR], method="fedavg")).min() > 1e5


def test_distances():
    rng = np.random.default_rng(3)
    points = rng.normal(size=(4, 200_000)).astype(np.float32)
    squared = squared_distances(list(points))
    exact = points.astype(np.float64)
    assert squared == pytest.approx(np.square(exact[:, None] - exact[None]).sum(-1), rel=1e-12)
    weights = np.array([0.1, 0.2, 0.3, 0.4])
    assert distances_from(weights, squared) == pytest.approx(np.linalg.norm(exact - weights @ exact, axis=1), rel=1e-9)
