"""Scores from confusion counts.

Counts of different devices add up exactly, in any order, and every score of a task follows from their sum.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import ClassVar

import numpy as np

from fedhpc.registry import METRICS


def confusion(labels: np.ndarray, predictions: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts int64 ``[C, C]``: row = true class, column = predicted class."""
    cells = np.asarray(labels, np.int64) * num_classes + np.asarray(predictions, np.int64)
    return np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)


class Metric(ABC):
    """Scores of a task, beside its accuracy, from the counts of all examples together."""

    titles: ClassVar[Mapping[str, str]] = {}
    """Name of a score -> what reports call it."""
    less_is_better: ClassVar[Collection[str]] = ()
    """Names of scores of which the lowest is the best."""
    lowest = 0.0
    """That the metric can be."""

    @abstractmethod
    def scores(self, counts: np.ndarray, accuracy: float) -> dict[str, float]:
        """Scores by name, the metric's own last, from counts [C, C]; a zero denominator gives 0."""


@METRICS.register("accuracy")
class Accuracy(Metric):
    """Accuracy alone."""

    titles: ClassVar[Mapping[str, str]] = {"accuracy": "accuracy"}

    def scores(self, counts: np.ndarray, accuracy: float) -> dict[str, float]:
        """None beside it."""
        return {}


@METRICS.register("matthews")
class Matthews(Metric):
    """Matthews correlation for any number of classes (Gorodkin 2004, the R_K statistic)."""

    titles: ClassVar[Mapping[str, str]] = {"matthews": "Matthews correlation"}
    lowest = -1.0

    def scores(self, counts: np.ndarray, accuracy: float) -> dict[str, float]:
        """See `Metric`."""
        total = float(counts.sum())
        true, predicted = counts.sum(axis=1).astype(float), counts.sum(axis=0).astype(float)
        covariance = float(np.trace(counts)) * total - true @ predicted
        spread = math.sqrt((total**2 - true @ true) * (total**2 - predicted @ predicted))
        return {"matthews": ratio(covariance, spread)}


@METRICS.register("accuracy_f1")
class AccuracyF1(Metric):
    """F1 of the last class, and its mean with the accuracy, as papers have it for MRPC and QQP."""

    titles: ClassVar[Mapping[str, str]] = {"f1": "F1", "accuracy_f1": "mean of accuracy and F1"}

    def scores(self, counts: np.ndarray, accuracy: float) -> dict[str, float]:
        """See `Metric`."""
        f1 = ratio(2 * counts[-1, -1], counts[-1].sum() + counts[:, -1].sum())
        return {"f1": f1, "accuracy_f1": (accuracy + f1) / 2}


def score(counts: np.ndarray, metric: str) -> dict[str, float]:
    """Accuracy and the metric's scores, by name; a zero denominator gives 0, as scikit-learn does."""
    accuracy = ratio(np.trace(counts), counts.sum())
    return {"accuracy": accuracy, **METRICS[metric]().scores(counts, accuracy)}


def ratio(numerator: float, denominator: float) -> float:
    """The quotient, or 0."""
    return float(numerator) / float(denominator) if denominator else 0.0
