"""Scores from confusion counts.

Counts of different devices add up exactly, in any order, and every score of a task follows from their sum.
"""

import math

import numpy as np


def confusion(labels: np.ndarray, predictions: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts int64 ``[C, C]``: row = true class, column = predicted class."""
    cells = np.asarray(labels, np.int64) * num_classes + np.asarray(predictions, np.int64)
    return np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)


def score(counts: np.ndarray, metric: str) -> dict[str, float]:
    """Accuracy, and by ``metric`` also ``matthews``, or ``f1`` and their mean ``accuracy_f1``, as papers have it.

    A zero denominator gives 0, as scikit-learn does.
    """
    scores = {"accuracy": _ratio(np.trace(counts), counts.sum())}
    if metric == "matthews":
        scores["matthews"] = _matthews(counts)
    elif metric == "accuracy_f1":
        true_positives = counts[-1, -1]
        scores["f1"] = _ratio(2 * true_positives, counts[-1].sum() + counts[:, -1].sum())
        scores["accuracy_f1"] = (scores["accuracy"] + scores["f1"]) / 2
    return scores


def _matthews(counts: np.ndarray) -> float:
    """Matthews correlation for any number of classes (Gorodkin 2004, the R_K statistic)."""
    total = float(counts.sum())
    true, predicted = counts.sum(axis=1).astype(float), counts.sum(axis=0).astype(float)
    covariance = float(np.trace(counts)) * total - true @ predicted
    return _ratio(covariance, math.sqrt((total**2 - true @ true) * (total**2 - predicted @ predicted)))


def _ratio(numerator: float, denominator: float) -> float:
    return float(numerator) / float(denominator) if denominator else 0.0
