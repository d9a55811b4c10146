"""Division of a data set among devices, a function of (seed, groups of the examples, settings) alone.

How the training examples are divided is a partition's own (`fedhpc.federation.partitions`). The validation split
gets the sizes and group mixes that the devices' training parts came out with, unless the groups themselves are devices.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fedhpc.config.sections import FederationConfig, Part
from fedhpc.errors import ConfigError
from fedhpc.registry import PARTITIONS
from fedhpc.seeding import generator

if TYPE_CHECKING:
    from fedhpc.data.prepared import PreparedData  # imports torch, which reading a job should not

SIZE_CONCENTRATION = 5.0
"""Of the Dirichlet distribution of the devices' sizes."""
NOBODY = -1
"""In place of the device of an example that belongs to none."""
Words = Callable[[np.ndarray], np.ndarray]
"""The backbone's word embeddings, float32 [m, H], of token ids [m]."""


@dataclass(frozen=True, kw_only=True)
class Groups:
    """What examples are divided by, each in one: classes or categories, natural devices, topics."""

    train: np.ndarray
    """int64 [n]"""
    validation: np.ndarray
    """The same of the other split."""
    names: Sequence[str]
    """Empty where all are in one that has none."""
    examples: Sequence[int] = ()
    """A typical training example of each, where the names say little."""


@dataclass(frozen=True)
class Partition:
    """The examples of each device: ascending int64 indices into the training and the validation split."""

    train: list[np.ndarray]
    validation: list[np.ndarray]
    groups: Groups | None = None
    """What the devices differ in."""
    names: Sequence[str] = ()
    """Of the devices, where they have some."""
    left_out: str = ""
    """What belongs to no device, in words."""

    @property
    def evaluated(self) -> np.ndarray:
        """The validation examples of all devices, ascending: the others belong to nobody."""
        return np.sort(np.concatenate(self.validation))


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
    by_group = False
    """Whether it needs at least two groups."""
    natural = False
    """Whether a group is a device by itself, with its examples of both splits and its name. Training examples may then
    belong to `NOBODY`."""

    def __init__(self, config: Any, seed: int) -> None:
        self.config, self.seed = config, seed

    def groups(self, data: "PreparedData", words: Words) -> Groups:
        """What it divides by: the examples' classes, of texts to be generated their categories.

        Raises:
            ConfigError: the data do not have it.
        """
        return classes_of(data)

    @abstractmethod
    def owners(self, labels: np.ndarray, num_classes: int) -> np.ndarray:
        """The device of every training example, int64 [n], from their groups [n]; no device without one."""

    def left_out(self, groups: Groups, partition: Partition) -> str:
        """What belongs to no device, in words; empty where all has one."""
        return ""

    def rng(self, purpose: str) -> np.random.Generator:
        """Randomness for one purpose."""
        return generator(self.seed, purpose=f"partition/{purpose}")

    def describe_need(self) -> tuple[str, str]:
        """What too few examples cannot fill, and what would help beside fewer devices, in words."""
        return f"{self.config.num_devices} devices", ""


def divide(data: "PreparedData", config: FederationConfig, seed: int, words: Words) -> Partition:
    """Divide a prepared data set.

    Args:
        config: the section `federation`.
        seed: of the run.
        words: of the run's backbone.

    Raises:
        ConfigError: the data cannot be divided so.
    """
    classes = classes_of(data)
    is_generation = data.description.head == "language_model"
    if not is_generation and len(np.unique(classes.train)) < 2:
        raise ConfigError("all training examples have the same label: there is nothing to learn")
    partitioner: Partitioner = PARTITIONS[config.partition](config, seed)
    groups = partitioner.groups(data, words)
    if partitioner.by_group and len(np.unique(groups.train)) < 2:
        found = f"all have the same, {groups.names[groups.train[0]]!r}" if groups.names else "they have none"
        raise ConfigError(
            f"federation.partition: {config.partition} needs texts of at least two categories, and {found}; name a "
            "column of several values under `category:` in the task file and run `fedhpc prepare` again, or use "
            "column, iid, quantity or cluster"
        )
    partition = _divided(partitioner, groups.train, groups.validation)
    if not partitioner.natural:
        return replace(partition, groups=groups)
    names = [groups.names[groups.train[own[0]]] for own in partition.train]
    return replace(partition, groups=classes, names=names, left_out=partitioner.left_out(groups, partition))


def classes_of(data: "PreparedData") -> Groups:
    """The classes of a data set's examples, of texts to be generated their categories."""
    train, validation = (np.asarray(data.split(name).labels, np.int64) for name in ("train", "validation"))
    return Groups(train=train, validation=validation, names=data.description.class_names)


def make_partition(
    train_labels: np.ndarray, validation_labels: np.ndarray, config: FederationConfig, seed: int
) -> Partition:
    """Divide both splits by their labels: every example on exactly one device, no device without a training example.

    A device's validation part may be empty where the validation split is small.

    Args:
        train_labels: groups [n], as a rule classes.
        validation_labels: the same of the other split.
        config: the section `federation`.
        seed: of the run.

    Raises:
        ConfigError: the examples cannot be divided so.
    """
    labels = (np.asarray(each, np.int64) for each in (train_labels, validation_labels))
    return _divided(PARTITIONS[config.partition](config, seed), *labels)


def _divided(partitioner: Partitioner, train_labels: np.ndarray, validation_labels: np.ndarray) -> Partition:
    _check(train_labels, partitioner)
    name, num_devices = partitioner.config.partition, partitioner.config.num_devices
    num_groups = 1 + max(train_labels.max(), validation_labels.max(initial=0))
    owners = np.asarray(partitioner.owners(train_labels, num_groups))
    valid = range(NOBODY if partitioner.natural else 0, num_devices)
    if owners.shape != train_labels.shape or not set(owners.tolist()) <= set(valid):
        raise ConfigError(
            f"federation.partition: {name} must give each of the {len(train_labels)} examples a device from 0 to "
            f"{num_devices - 1}; found {len(owners)} from {owners.min()} to {owners.max()}"
        )
    train = _parts(owners, num_devices)
    if empty := [device for device, part in enumerate(train) if not len(part)]:
        raise ConfigError(f"federation.partition: {name} leaves devices {empty[:5]} without an example")
    if partitioner.natural:
        of_group = np.full(num_groups, NOBODY)
        of_group[train_labels] = owners
        return Partition(train, _parts(of_group[validation_labels], num_devices))
    counts = class_counts(train, train_labels, num_groups)
    sizes = _proportional_sizes(len(validation_labels), counts.sum(axis=1))
    validation = owners_by_mix(validation_labels, sizes, counts, partitioner.rng("validation"))
    return Partition(train, _parts(validation, num_devices))


def class_counts(parts: list[np.ndarray], labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Examples of each class on each device, int64 ``[N, C]``."""
    return np.stack([np.bincount(labels[part], minlength=num_classes) for part in parts])


def group_counts(partition: Partition) -> tuple[Sequence[str], np.ndarray]:
    """The names [C] of what the devices of a prepared data set differ in, and training examples of each, ``[N, C]``."""
    assert partition.groups is not None
    names = partition.groups.names or ["texts"]
    return names, class_counts(partition.train, partition.groups.train, len(names))


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
    borders = np.cumsum(np.bincount(owners - NOBODY, minlength=num_devices - NOBODY))[:-1]
    return np.split(np.argsort(owners, kind="stable"), borders)[-NOBODY:]
