"""Division of a data set among devices, a function of (seed, labels, settings) alone.

How the training examples are divided is a partition's own (`fedhpc.federation.partitions`). The validation split
gets the sizes and class mixes that the devices' training parts came out with.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from fedhpc.config import FederationConfig, Part
from fedhpc.errors import ConfigError
from fedhpc.registry import PARTITIONS
from fedhpc.seeding import generator

SIZE_CONCENTRATION = 5.0
"""Of the Dirichlet distribution of the devices' sizes."""


@dataclass(frozen=True)
class Partition:
    """The examples of each device: ascending int64 indices into the training and the validation split."""

    train: list[np.ndarray]
    validation: list[np.ndarray]


class Partitioner(Part, ABC):
    """One way to divide the training examples; a function of the seed, the labels and its Config.

    Args:
        config: its Config, the section `federation`.
        seed: of the run.
    """

    Config: ClassVar[type[FederationConfig]] = FederationConfig
    strength: str | None = None
    """Key that says how skewed the partition is, for reports."""
    examples_per_device = 1
    """That a device has at least."""

    def __init__(self, config: Any, seed: int) -> None:
        self.config, self.seed = config, seed

    @abstractmethod
    def owners(self, labels: np.ndarray, num_classes: int) -> np.ndarray:
        """The device of every training example, int64 [n], from their classes [n]; no device without one."""

    def rng(self, purpose: str) -> np.random.Generator:
        """Randomness for one purpose."""
        return generator(self.seed, purpose=f"partition/{purpose}")

    def describe_need(self) -> tuple[str, str]:
        """What too few examples cannot fill, and what would help beside fewer devices, in words."""
        return f"{self.config.num_devices} devices", ""


def make_partition(
    train_labels: np.ndarray,
    validation_labels: np.ndarray,
    config: FederationConfig,
    seed: int,
    *,
    classified: bool = True,
) -> Partition:
    """Divide both splits: every example on exactly one device, no device without a training example.

    A device's validation part may be empty where the validation split is small.

    Args:
        train_labels: classes [n].
        validation_labels: the same of the other split.
        config: the section `federation`.
        seed: of the run.
        classified: whether the labels are what is learnt.

    Raises:
        ConfigError: the examples cannot be divided so.
    """
    train_labels = np.asarray(train_labels, np.int64)
    validation_labels = np.asarray(validation_labels, np.int64)
    partitioner: Partitioner = PARTITIONS[config.partition](config, seed)
    _check(train_labels, partitioner)
    if classified and len(np.unique(train_labels)) < 2:
        raise ConfigError("all training examples have the same label: there is nothing to learn")
    num_devices = config.num_devices
    num_classes = 1 + max(train_labels.max(), validation_labels.max(initial=0))
    owners = np.asarray(partitioner.owners(train_labels, num_classes))
    if owners.shape != train_labels.shape or not set(owners.tolist()) <= set(range(num_devices)):
        raise ConfigError(
            f"federation.partition: {config.partition} must give each of the {len(train_labels)} examples a device "
            f"from 0 to {num_devices - 1}; found {len(owners)} from {owners.min()} to {owners.max()}"
        )
    train = _parts(owners, num_devices)
    if empty := [device for device, part in enumerate(train) if not len(part)]:
        raise ConfigError(f"federation.partition: {config.partition} leaves devices {empty[:5]} without an example")

    counts = class_counts(train, train_labels, num_classes)
    sizes = _proportional_sizes(len(validation_labels), counts.sum(axis=1))
    rng = partitioner.rng("validation")
    return Partition(train, _parts(owners_by_mix(validation_labels, sizes, counts, rng), num_devices))


def class_counts(parts: list[np.ndarray], labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Examples of each class on each device, int64 ``[N, C]``."""
    return np.stack([np.bincount(labels[part], minlength=num_classes) for part in parts])


def label_skew(counts: np.ndarray) -> float:
    """How far the devices' class mixes are from the whole's, 0 (the same) to 1: mean total variation distance."""
    devices = counts[counts.sum(axis=1) > 0]
    mixes = devices / devices.sum(axis=1, keepdims=True)
    return float(np.abs(mixes - devices.sum(axis=0) / devices.sum()).sum(axis=1).mean() / 2)


def _check(labels: np.ndarray, partitioner: Partitioner) -> None:
    num_devices, per_device = partitioner.config.num_devices, partitioner.examples_per_device
    if len(labels) < num_devices * per_device:
        needs, remedy = partitioner.describe_need()
        raise ConfigError(
            f"{len(labels)} training examples cannot fill {needs}; num_devices of at most "
            f"{len(labels) // per_device} would do{remedy}"
        )


def even_sizes(total: int, num_devices: int) -> np.ndarray:
    """Sizes that differ by one at most."""
    return total // num_devices + (np.arange(num_devices) < total % num_devices)


def dirichlet_sizes(total: int, num_devices: int, rng: np.random.Generator) -> np.ndarray:
    """Sizes from Dirichlet(5, ..., 5), rounded, the remainder on the last device; at least one example each."""
    sizes = np.rint(rng.dirichlet(np.full(num_devices, SIZE_CONCENTRATION)) * total).astype(np.int64)
    sizes[-1] += total - sizes.sum()
    missing = np.maximum(1 - sizes, 0)
    sizes += missing
    for _ in range(missing.sum()):
        sizes[sizes.argmax()] -= 1
    return sizes


def _proportional_sizes(total: int, weights: np.ndarray) -> np.ndarray:
    """Sizes within one of ``total`` times each weight's share, summing to ``total``; rounding errors do not pile up."""
    borders = np.rint(np.cumsum(weights) / weights.sum() * total).astype(np.int64)
    return np.diff(borders, prepend=0)


def owners_in_order(order: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The first examples of an order on the first device, and so on."""
    owners = np.empty(len(order), np.int64)
    owners[order] = np.repeat(np.arange(len(sizes)), sizes)
    return owners


def owners_by_mix(labels: np.ndarray, sizes: np.ndarray, mixes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Devices of these sizes and, as far as there are examples, class mixes [N, C]; examples at random."""
    counts = _draw_counts(np.bincount(labels, minlength=mixes.shape[1]), sizes, mixes.astype(float), rng)
    owners = np.empty(len(labels), np.int64)
    for label in range(mixes.shape[1]):
        examples = rng.permutation(np.flatnonzero(labels == label))
        owners[examples] = np.repeat(np.arange(len(sizes)), counts[:, label])
    return owners


def _draw_counts(available: np.ndarray, sizes: np.ndarray, mixes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Class counts ``[N, C]`` with these row and column sums, drawn from the devices' class mixes.

    All devices ask for what they lack at once, from the classes still left. A class asked for too often is given out
    at random among those who asked and is then used up. The asked and the left add up to the same number, so every
    turn uses up a class or is the last: at most C turns.
    """
    counts = np.zeros_like(mixes, dtype=np.int64)
    available, lacking = available.copy(), sizes.copy()
    while lacking.any():
        left = np.flatnonzero(available)
        weights = mixes[:, left]
        # A device whose classes are all used up takes from the others as they are left.
        weights = np.where(weights.sum(axis=1, keepdims=True) > 0, weights, available[left])
        asked = rng.multinomial(lacking, weights / weights.sum(axis=1, keepdims=True))
        for column, label in enumerate(left):
            granted = asked[:, column]
            if granted.sum() > available[label]:
                granted = rng.multivariate_hypergeometric(granted, available[label], method="marginals")
            counts[:, label] += granted
            available[label] -= granted.sum()
            lacking -= granted
    return counts


def _parts(owners: np.ndarray, num_devices: int) -> list[np.ndarray]:
    borders = np.cumsum(np.bincount(owners, minlength=num_devices))[:-1]
    return np.split(np.argsort(owners, kind="stable"), borders)
