"""Division of a data set among devices, a function of (seed, labels, settings) alone.

``dirichlet`` follows the released FedPepTAO code: device sizes from Dirichlet(5, ..., 5), class mixes from
Dirichlet(alpha), examples drawn without replacement. The validation split gets the sizes and class mixes that the
devices' training parts came out with.
"""

import math
from dataclasses import dataclass

import numpy as np

from fedhpc.errors import ConfigError
from fedhpc.seeding import generator

PARTITIONS = ("dirichlet", "quantity", "iid", "shards")
_SIZE_CONCENTRATION = 5.0


@dataclass(frozen=True)
class Partition:
    """The examples of each device: ascending int64 indices into the training and the validation split."""

    train: list[np.ndarray]
    validation: list[np.ndarray]


def make_partition(
    train_labels: np.ndarray,
    validation_labels: np.ndarray,
    *,
    num_devices: int,
    kind: str = "dirichlet",
    alpha: float = 1.0,
    shards_per_device: int = 2,
    seed: int,
) -> Partition:
    """Divide both splits: every example on exactly one device, no device without a training example.

    A device's validation part may be empty where the validation split is small.

    Args:
        train_labels: classes [n].
        validation_labels: the same of the other split.

    Raises:
        ConfigError: the examples cannot be divided so.
    """
    train_labels = np.asarray(train_labels, np.int64)
    validation_labels = np.asarray(validation_labels, np.int64)
    _check(train_labels, num_devices, kind, alpha, shards_per_device)
    num_classes = 1 + max(train_labels.max(), validation_labels.max(initial=0))
    order = generator(seed, purpose="partition/order").permutation(len(train_labels))
    if kind == "iid":
        owners = _owners_in_order(order, _even_sizes(len(order), num_devices))
    elif kind == "quantity":
        owners = _owners_in_order(order, _dirichlet_sizes(len(order), num_devices, seed))
    elif kind == "shards":
        owners = _shard_owners(train_labels, order, num_devices, shards_per_device, seed)
    else:
        sizes = _dirichlet_sizes(len(order), num_devices, seed)
        mixes = generator(seed, purpose="partition/mixes").dirichlet(np.full(num_classes, alpha), num_devices)
        owners = _owners_by_mix(train_labels, sizes, mixes, generator(seed, purpose="partition/train"))
    train = _parts(owners, num_devices)

    counts = class_counts(train, train_labels, num_classes)
    sizes = _proportional_sizes(len(validation_labels), counts.sum(axis=1))
    rng = generator(seed, purpose="partition/validation")
    return Partition(train, _parts(_owners_by_mix(validation_labels, sizes, counts, rng), num_devices))


def class_counts(parts: list[np.ndarray], labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Examples of each class on each device, int64 ``[N, C]``."""
    return np.stack([np.bincount(labels[part], minlength=num_classes) for part in parts])


def label_skew(counts: np.ndarray) -> float:
    """How far the devices' class mixes are from the whole's, 0 (the same) to 1: mean total variation distance."""
    devices = counts[counts.sum(axis=1) > 0]
    mixes = devices / devices.sum(axis=1, keepdims=True)
    return float(np.abs(mixes - devices.sum(axis=0) / devices.sum()).sum(axis=1).mean() / 2)


def _check(labels: np.ndarray, num_devices: int, kind: str, alpha: float, shards_per_device: int) -> None:
    if kind not in PARTITIONS:
        raise ConfigError(f"partition {kind!r} is none of {', '.join(PARTITIONS)}")
    if num_devices < 1 or (kind == "shards" and shards_per_device < 1):
        raise ConfigError(f"num_devices {num_devices} and shards_per_device {shards_per_device} must be at least 1")
    if kind == "dirichlet" and not (math.isfinite(alpha) and alpha > 0):
        raise ConfigError(f"alpha {alpha} must be a finite number above 0")
    per_device = shards_per_device if kind == "shards" else 1
    if len(labels) < num_devices * per_device:
        needs = f"{num_devices} devices" + (f" with {per_device} shards each" if kind == "shards" else "")
        raise ConfigError(
            f"{len(labels)} training examples cannot fill {needs}; num_devices of at most "
            f"{len(labels) // per_device} would do" + ("" if kind != "shards" else ", or fewer shards_per_device")
        )
    if len(np.unique(labels)) < 2:
        raise ConfigError("all training examples have the same label: there is nothing to learn")


def _even_sizes(total: int, num_devices: int) -> np.ndarray:
    return total // num_devices + (np.arange(num_devices) < total % num_devices)


def _dirichlet_sizes(total: int, num_devices: int, seed: int) -> np.ndarray:
    """Sizes from Dirichlet(5, ..., 5), rounded, the remainder on the last device; at least one example each."""
    rng = generator(seed, purpose="partition/sizes")
    sizes = np.rint(rng.dirichlet(np.full(num_devices, _SIZE_CONCENTRATION)) * total).astype(np.int64)
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


def _owners_in_order(order: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    owners = np.empty(len(order), np.int64)
    owners[order] = np.repeat(np.arange(len(sizes)), sizes)
    return owners


def _shard_owners(
    labels: np.ndarray, order: np.ndarray, num_devices: int, shards_per_device: int, seed: int
) -> np.ndarray:
    """Examples sorted by label, cut into equal shards, so many random shards to each device (McMahan 2017)."""
    num_shards = num_devices * shards_per_device
    by_label = order[np.argsort(labels[order], kind="stable")]
    shards = _owners_in_order(by_label, _even_sizes(len(labels), num_shards))
    return generator(seed, purpose="partition/shards").permutation(num_shards)[shards] // shards_per_device


def _owners_by_mix(labels: np.ndarray, sizes: np.ndarray, mixes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
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
