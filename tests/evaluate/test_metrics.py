from types import SimpleNamespace

import numpy as np
import pytest

from fedhpc.evaluate.metrics import confusion, score
from fedhpc.evaluate.outcomes import Classes, Tokens


def test_confusion_counts_true_by_row_and_predicted_by_column():
    counts = confusion(np.array([0, 0, 1, 2, 2]), np.array([0, 1, 1, 0, 2]), 3)
    assert counts.tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 1]]
    assert counts.dtype == np.int64


def test_confusions_of_shards_add_up():
    rng = np.random.default_rng(0)
    labels, predictions = rng.integers(0, 3, (2, 50))
    shards = [confusion(labels[i::4], predictions[i::4], 3) for i in range(4)]
    assert (sum(shards) == confusion(labels, predictions, 3)).all()


def test_binary_scores_by_hand():
    # 50 true negatives, 10 false positives, 5 false negatives, 35 true positives.
    counts = np.array([[50, 10], [5, 35]])
    assert score(counts, "accuracy") == {"accuracy": 0.85}
    # 2 * 35 / (2 * 35 + 10 + 5)
    assert score(counts, "accuracy_f1") == pytest.approx(
        {"accuracy": 0.85, "f1": 70 / 85, "accuracy_f1": (0.85 + 70 / 85) / 2}
    )
    # (tp tn - fp fn) / sqrt((tp+fp)(tp+fn)(tn+fp)(tn+fn))
    expected = (35 * 50 - 10 * 5) / (45 * 40 * 60 * 55) ** 0.5
    assert score(counts, "matthews") == pytest.approx({"accuracy": 0.85, "matthews": expected})


def test_matthews_of_three_classes_is_the_correlation_of_indicators():
    labels = np.array([0, 0, 1, 1, 1, 2, 2, 2, 2, 0])
    predictions = np.array([0, 1, 1, 1, 2, 2, 2, 0, 2, 0])
    true, predicted = np.eye(3)[labels], np.eye(3)[predictions]
    true, predicted = true - true.mean(0), predicted - predicted.mean(0)
    expected = (true * predicted).sum() / np.sqrt((true**2).sum() * (predicted**2).sum())
    assert score(confusion(labels, predictions, 3), "matthews")["matthews"] == pytest.approx(expected)


@pytest.mark.parametrize("counts", [np.zeros((2, 2), np.int64), np.array([[7, 0], [0, 0]]), np.array([[4, 0], [3, 0]])])
def test_zero_denominators_give_zero(counts):
    assert score(counts, "matthews")["matthews"] == 0.0
    assert score(counts, "accuracy_f1")["f1"] == 0.0
    assert score(counts, "accuracy")["accuracy"] == pytest.approx(counts[0, 0] / max(counts.sum(), 1))


def test_no_score_is_made_of_no_example():
    """A perplexity of no token would be 1, the best there is."""
    tokens = Tokens(SimpleNamespace(), 2, held_out=[1])
    for device, behind in ((0, "_held_out"), (1, "")):
        parts = np.zeros(3, tokens.dtype)
        parts["tokens"][:, device], parts["right"][:, device], parts["right_global"][:, device] = 4, 2, 2
        found = tokens.scores(parts)
        assert found[f"perplexity{behind}"] is None
        assert {found[f"accuracy{view}"] for view in ("", "_held_out") if view != behind} == {0.5}
    assert found["perplexity_global"] is None
    assert (found["perplexity_held_out"], found["accuracy"]) == (1.0, 0.0)

    classes = Classes(SimpleNamespace(class_names=["a", "b"], metric="accuracy_f1"), 2, held_out=[1])
    parts = np.zeros(3, classes.dtype)
    parts["personal"] += np.eye(2, dtype=int)
    found = classes.scores(parts)
    assert [found[f"{name}_held_out"] for name in ("accuracy", "f1", "accuracy_f1")] == [None] * 3
    assert found["f1"] == found["accuracy"] == 1
