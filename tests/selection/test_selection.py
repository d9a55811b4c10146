import numpy as np
import pytest

from fedhpc.config import section_of
from fedhpc.errors import ConfigError
from fedhpc.registry import STRATEGIES
from fedhpc.selection import make_strategy
from fedhpc.selection.strategies.score import layer_score
from fedhpc.selection.strategy import global_scores, num_selected

SCORES = np.array([3.0, 5.0, 1.0, 5.0, 4.0, 1.0])


def strategy_of(**values):
    return make_strategy(section_of(STRATEGIES, **values))


def choose(strategy, count=3, *, scores=SCORES, seed=1, **more):
    return strategy_of(strategy=strategy, **more).choose(
        ratio=count / len(SCORES), num_layers=len(SCORES), seed=seed, scores=scores
    )


def test_score_of_two_examples_at_a_known_angle():
    # Cosine 0.6: the similarity matrix [[1, .6], [.6, 1]] has the eigenvalues 0.4 and 1.6. Padding counts: [b, s, H].
    hidden = np.array([[[5.0, 0.0], [0.0, 0.0]], [[0.3, 0.4], [0.0, 0.0]]], np.float32)
    sigma = np.array([0.4, 1.6]) + 1e-5
    assert layer_score(hidden) == pytest.approx(np.sum(np.log(sigma) + 1 / sigma), rel=1e-6)


def test_hidden_states_that_are_not_finite_have_no_score():
    with pytest.raises(FloatingPointError, match=r"not finite; try another model\.dtype"):
        layer_score(np.array([[[1.0, np.nan]], [[0.5, 2.0]]], np.float16))


def test_score_of_orthogonal_and_of_equal_examples():
    # Orthogonal: all eigenvalues 1, the least possible score. Equal: one eigenvalue b, the others 0, offset 1e-5.
    assert layer_score(np.eye(4)[:, None]) == pytest.approx(4 * (np.log(1 + 1e-5) + 1 / (1 + 1e-5)))
    expected = np.log(3 + 1e-5) + 1 / (3 + 1e-5) + 2 * (np.log(1e-5) + 1e5)
    assert layer_score(np.ones((3, 2, 2))) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("distance", "length"), [("l1", 7.0), ("l2", 5.0)])
def test_score_from_distances(distance, length):
    # Two examples at distance d: similarities [[d, 0], [0, d]], both eigenvalues d.
    hidden = np.array([[[1.0, 1.0]], [[4.0, 5.0]]])
    expected = 2 * (np.log(length + 1e-5) + 1 / (length + 1e-5))
    assert layer_score(hidden, distance) == pytest.approx(expected, rel=1e-9)


def test_global_score_weighs_devices_by_their_examples():
    scores = np.array([[1.0, 10.0], [3.0, -10.0]])
    np.testing.assert_allclose(global_scores(scores, np.array([30, 10])), [1.5, 5.0])


def test_highest_scores_are_chosen_and_ties_go_to_the_lower_index():
    assert [choose("score", count) for count in (1, 2, 3)] == [(1,), (1, 3), (1, 3, 4)]
    assert [choose("lowest_score", count) for count in (1, 2, 3)] == [(2,), (2, 5), (0, 2, 5)]


@pytest.mark.parametrize(
    ("strategy", "count", "alike"),
    [("score", 1, [1, 3]), ("score", 2, []), ("score", 3, []), ("lowest_score", 1, [2, 5]), ("lowest_score", 2, [])],
)
def test_layers_that_scores_do_not_decide_on(strategy, count, alike):
    chosen, facts = strategy_of(strategy=strategy), {"ratio": count / len(SCORES), "num_layers": len(SCORES)}
    rounded = SCORES * (1 + 1e-9 * np.arange(len(SCORES)))
    assert chosen.undecided_layers(scores=SCORES, **facts) == chosen.undecided_layers(scores=rounded, **facts) == alike
    assert chosen.undecided_layers(scores=SCORES, ratio=1.0, num_layers=len(SCORES)) == []


def test_strategies_without_scores():
    assert choose("first", scores=None) == (0, 1, 2)
    assert choose("last", scores=None) == (3, 4, 5)
    assert choose("all", 1, scores=None) == (0, 1, 2, 3, 4, 5)
    assert choose("explicit", 1, scores=None, layers=[4, 0, 5]) == (0, 4, 5)


def test_random_layers_follow_the_seed_alone():
    draws = [choose("random", scores=None, seed=seed) for seed in range(50)]
    assert draws == [choose("random", seed=seed) for seed in range(50)]
    assert all(len(set(layers)) == 3 and list(layers) == sorted(layers) for layers in draws)
    assert set(range(6)) == {layer for layers in draws for layer in layers}
    assert len(set(draws)) > 10


@pytest.mark.parametrize(
    ("ratio", "layers", "count"), [(0.5, 12, 6), (0.5, 3, 1), (1.0, 7, 7), (1 / 3, 3, 1), (0.29, 100, 29), (0.7, 10, 7)]
)
def test_a_ratio_selects_the_whole_part(ratio, layers, count):
    assert num_selected(ratio, layers) == count


def test_a_ratio_that_selects_nothing_says_which_would():
    with pytest.raises(ConfigError, match=r"selection\.ratio: 0\.05 of 12 layers selects no layer; valid: 0\.08"):
        strategy_of(ratio=0.05).check_layers(12)
    for harmless in ({"strategy": "all", "ratio": 0.05}, {"ratio": "auto"}, {"strategy": "explicit", "layers": [11]}):
        strategy_of(**harmless).check_layers(12)


def test_explicit_layers_outside_the_backbone_are_named():
    with pytest.raises(ConfigError, match=r"selection\.layers: \[12, 40\] not in the backbone; valid: 0 to 11"):
        strategy_of(strategy="explicit", layers=[0, 12, 40]).check_layers(12)
