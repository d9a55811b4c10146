import numpy as np
import pytest

from fedhpc.config import section_of
from fedhpc.errors import ConfigError
from fedhpc.federation.partition import class_counts, label_skew, make_partition
from fedhpc.registry import PARTITIONS
from fedhpc.seeding import generator

RNG = np.random.default_rng(3)
LABELS = RNG.choice(6, 5000, p=[0.21, 0.23, 0.02, 0.22, 0.16, 0.16])
VALIDATION = RNG.choice(6, 500)


def partition(num_devices=100, *, labels=LABELS, validation=VALIDATION, seed=42, kind="dirichlet", **settings):
    config = section_of(PARTITIONS, num_devices=num_devices, partition=kind, **settings)
    return make_partition(labels, validation, config, seed)


def skew(parts, labels=LABELS):
    return label_skew(class_counts(parts, labels, 6))


@pytest.mark.parametrize(
    ("kind", "alpha"),
    [("dirichlet", 1e-6), ("dirichlet", 0.1), ("dirichlet", 1e6), ("quantity", 1), ("iid", 1), ("shards", 1)],
)
@pytest.mark.parametrize(("num_train", "num_devices"), [(5000, 100), (120, 60), (40, 20), (5000, 1)])
def test_every_example_is_on_exactly_one_device_and_no_device_is_empty(kind, alpha, num_train, num_devices):
    labels = LABELS[:num_train]
    result = partition(num_devices, labels=labels, kind=kind, alpha=alpha)
    for parts, total in ((result.train, num_train), (result.validation, len(VALIDATION))):
        assert len(parts) == num_devices
        assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(total))
        assert all((np.diff(part) > 0).all() and part.dtype == np.int64 for part in parts)
    assert min(map(len, result.train)) > 0


def test_as_many_devices_as_examples():
    assert {len(part) for part in partition(200, labels=LABELS[:200]).train} == {1}


@pytest.mark.parametrize("kind", [kind for kind in PARTITIONS if not PARTITIONS[kind].natural])
def test_same_seed_same_partition_other_seed_another(kind):
    one, same, other = (partition(kind=kind, seed=seed) for seed in (1, 1, 2))
    assert all(map(np.array_equal, one.train + one.validation, same.train + same.validation))
    assert not all(map(np.array_equal, one.train, other.train))


def test_the_partition_of_a_seed_stays_what_it_is():
    # A run is resumed with the partition it began with: a change here breaks every checkpoint in use.
    parts = partition(4, labels=np.arange(20) % 3, validation=np.arange(6) % 3, seed=7)
    assert [part.tolist() for part in parts.train] == [
        [1, 2, 5, 11, 12, 14],
        [6, 9],
        [0, 13, 15],
        [3, 4, 7, 8, 10, 16, 17, 18, 19],
    ]
    assert [part.tolist() for part in parts.validation] == [[2, 4], [], [0], [1, 3, 5]]
    others = {
        "quantity": [[1, 2, 4, 6, 7, 16], [3, 12], [5, 10, 14], [0, 8, 9, 11, 13, 15, 17, 18, 19]],
        "iid": [[1, 2, 4, 6, 7], [3, 5, 12, 14, 16], [10, 15, 17, 18, 19], [0, 8, 9, 11, 13]],
        "shards": [[0, 4, 7, 9, 15, 18], [1, 10, 13, 16, 19], [2, 5, 14, 17], [3, 6, 8, 11, 12]],
    }
    for kind, expected in others.items():
        parts = partition(4, labels=np.arange(20) % 3, validation=np.arange(6) % 3, seed=7, kind=kind)
        assert [part.tolist() for part in parts.train] == expected


def test_skew_grows_as_alpha_falls():
    skews = [skew(partition(alpha=alpha).train) for alpha in (1000, 10, 1, 0.1, 0.01)]
    assert skews == sorted(skews)
    assert skews[0] < 0.2
    assert skews[-1] > 0.6


def test_sizes_follow_dirichlet_5_and_do_not_depend_on_alpha():
    sizes = np.array([len(part) for part in partition(alpha=1).train])
    assert np.array_equal(sizes, [len(part) for part in partition(alpha=0.1).train])
    shares = generator(42, purpose="partition/sizes").dirichlet(np.full(100, 5.0))
    assert np.array_equal(sizes[:-1], np.rint(shares * len(LABELS))[:-1])  # the remainder is on the last device
    # Dirichlet(5, ..., 5) over N: the relative standard deviation is sqrt((N - 1) / (5 N + 1)) = 0.444.
    assert sizes.std() / sizes.mean() == pytest.approx(0.444, abs=0.1)
    assert np.ptp([len(part) for part in partition(kind="iid").train]) <= 1


def test_validation_follows_the_sizes_and_mixes_of_training():
    labels, validation = (np.random.default_rng(0).choice(6, 20000) for _ in range(2))
    result = partition(20, labels=labels, validation=validation, alpha=0.3)
    train, evaluated = class_counts(result.train, labels, 6), class_counts(result.validation, validation, 6)
    assert np.abs(train.sum(1) - evaluated.sum(1)).max() <= 1
    assert label_skew(train) > 0.4
    assert np.abs(train / train.sum(1, keepdims=True) - evaluated / evaluated.sum(1, keepdims=True)).max() < 0.06


def test_small_validation_may_leave_devices_without_any():
    result = partition(100, validation=VALIDATION[:30])
    assert sum(map(len, result.validation)) == 30
    assert max(map(len, result.validation)) <= 2
    assert sum(map(len, partition(100, validation=VALIDATION[:0]).validation)) == 0


def test_shards_hold_few_classes():
    counts = class_counts(partition(50, kind="shards", shards_per_device=2).train, LABELS, 6)
    # A shard of 50 examples spans at most two of the classes, but for the rarest, of about 100.
    assert (counts > 0).sum(axis=1).max() <= 4
    assert label_skew(counts) > 0.5


def test_a_large_set_takes_no_time():
    labels = np.random.default_rng(0).integers(0, 2, 67349)
    counts = class_counts(partition(1000, labels=labels, alpha=0.01).train, labels, 2)
    assert counts.sum() == 67349


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_devices": 5001}, "num_devices of at most 5000 would do"),
        ({"num_devices": 2000, "kind": "shards", "shards_per_device": 3}, "at most 1666 would do, or fewer shards"),
    ],
)
def test_impossible_partitions_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        partition(**settings)
