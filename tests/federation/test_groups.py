"""Devices by what the texts are: a column's values, topics."""

import numpy as np
import pytest
from texts import AUTHORS, prepare_texts

from fedhpc.config import section_of
from fedhpc.data.prepared import PreparedData
from fedhpc.errors import ConfigError
from fedhpc.federation.partition import class_counts, divide, group_counts, label_skew
from fedhpc.federation.partitions.cluster import k_means, places, prompts_of
from fedhpc.model.word_embeddings import WordEmbeddings
from fedhpc.registry import PARTITIONS


@pytest.fixture(scope="module")
def words(world):
    return WordEmbeddings(str(world.parent / "backbone"))


@pytest.fixture(scope="module")
def divided(prepared_texts, words):
    def by(kind, num_devices, *, seed=1, path=prepared_texts, **keys):
        data = PreparedData.open(path, verify=False)
        return divide(data, section_of(PARTITIONS, partition=kind, num_devices=num_devices, **keys), seed, words)

    return by


@pytest.fixture(scope="module")
def data(prepared_texts):
    return PreparedData.open(prepared_texts, verify=False)


def owned(data, split, parts):
    """The authors of each device's examples, and of those that belong to nobody."""
    names = np.array(data.description.generation["devices"])[data.split(split).devices]
    rest = np.setdiff1d(np.arange(len(names)), np.concatenate(parts))
    return [names[part].tolist() for part in parts], sorted(set(names[rest]))


def test_a_column_gives_each_author_a_device_with_his_examples_of_both_splits(divided, data):
    partition = divided("column", 5)
    train, left = owned(data, "train", partition.train)
    assert dict(zip(partition.names, train, strict=True)) == {name: [name] * count for name, count in AUTHORS.items()}
    assert left == []
    validation, left = owned(data, "validation", partition.validation)
    assert validation == [[name] * 4 for name in partition.names]
    assert left == ["fay"]  # has nothing to train on
    assert "1 with fewer than federation.min_examples: 1" in partition.left_out
    assert "0 of 136 training examples and 4 of 24 validation examples belong to no device" in partition.left_out
    assert [data.split("validation").devices[i] for i in partition.evaluated] == [
        code for code in data.split("validation").devices if data.description.generation["devices"][code] != "fay"
    ]


def test_fewer_devices_than_authors_are_the_largest_or_a_sample(divided, data):
    assert set(divided("column", 2).names) == {"dot", "bob"}
    assert set(divided("column", 3).names) == {"dot", "bob", "cid"}
    _, left = owned(data, "train", divided("column", 3).train)
    assert left == ["ann", "eve"]
    samples = {tuple(divided("column", 2, seed=seed, choose="sample").names) for seed in range(20)}
    assert len(samples) > 5
    assert divided("column", 2, choose="sample").names == divided("column", 2, choose="sample").names
    samples = [divided("column", 2, seed=seed, choose="sample", min_examples=9).names for seed in range(20)]
    assert {name for names in samples for name in names} == {"ann", "bob", "cid", "dot"}
    assert "2 with fewer than federation.min_examples: 9, 2 not chosen (federation.choose: largest); 36 of" in (
        divided("column", 2, min_examples=9).left_out
    )


def test_categories_take_the_place_of_classes(divided):
    names, counts = group_counts(divided("dirichlet", 4, alpha=0.01))
    assert sorted(names) == ["bad", "good", "mixed"]
    assert label_skew(counts) > 0.2
    assert counts.sum() == 136
    assert (group_counts(divided("shards", 4))[1] > 0).sum(axis=1).max() <= 3
    assert group_counts(divided("column", 5))[0] == names


def test_topics_are_those_of_the_words(divided, data):
    # Four of four words of a mood: the same mean for all its texts, far from that of the others.
    partition = divided("cluster", 4, clusters=3, alpha=0.01)
    for split, topics in (("train", partition.groups.train), ("validation", partition.groups.validation)):
        pairs = set(zip(topics.tolist(), data.split(split).labels.tolist(), strict=True))
        assert len(pairs) == 3
    assert label_skew(class_counts(partition.train, data.split("train").labels, 3)) > 0.2
    assert [partition.groups.train[example] for example in partition.groups.examples] == [0, 1, 2]
    assert np.array_equal(np.sort(np.concatenate(partition.train)), np.arange(136))
    same, other = divided("cluster", 4, clusters=3, alpha=0.01), divided("cluster", 4, clusters=3, alpha=0.01, seed=2)
    assert all(map(np.array_equal, partition.train + partition.validation, same.train + same.validation))
    assert not all(map(np.array_equal, partition.train, other.train))


def test_labelled_texts_have_topics_too(world, divided):
    partition = divided("cluster", 4, path=world.parent / "prepared", clusters=3)
    assert set(partition.groups.train) == {0, 1, 2}


def test_places_do_not_depend_on_the_order_of_any_sum(words, data):
    prompts, _ = (prompts_of(data.split(name), None) for name in ("train", "validation"))

    def found(texts, change=lambda rows: rows):
        return places(texts, [], lambda ids: change(words(ids)), np.random.default_rng(3))[0]

    assert np.array_equal(found(prompts), found([text[::-1] for text in prompts[::-1]])[::-1])
    once = found(prompts)
    assert np.array_equal(once, np.rint(once))
    # What all words have in common says nothing.
    assert np.abs(found(prompts, lambda rows: rows + 2) - once).max() < 8
    # The directions of the mean word embeddings, but for the projection.
    means = np.stack([words(text.astype(np.int64)).mean(axis=0, dtype=float) for text in prompts])
    means -= means.mean(axis=0)
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    assert np.linalg.norm(once, axis=1) == pytest.approx(1024, abs=8)
    assert np.corrcoef((once @ once.T).ravel(), (means @ means.T).ravel())[0, 1] > 0.9


def test_k_means_finds_what_lies_together_and_no_centre_is_empty():
    rng = np.random.default_rng(0)
    middles = np.array([[0, 0], [900, 0], [0, 900], [900, 900]])
    points = np.concatenate([middle + rng.integers(-50, 50, (30, 2)) for middle in middles]).astype(float)
    for seed in range(5):
        centres = k_means(points, 4, np.random.default_rng(seed))
        assert {tuple(np.rint(centre / 900).astype(int)) for centre in centres} == {(0, 0), (1, 0), (0, 1), (1, 1)}
    few = np.repeat([[1.0, 0.0], [0.0, 5.0], [7.0, 7.0]], [50, 1, 1], axis=0)
    assert sorted(map(tuple, k_means(few, 3, np.random.default_rng(1)))) == [(0.0, 5.0), (1.0, 0.0), (7.0, 7.0)]
    # Of a few thousand seeds one of those with which a centre loses its last point on the way.
    points = np.unique(np.random.default_rng(828).integers(0, 30, (9, 3)), axis=0).astype(float)
    centres = k_means(points, 5, np.random.default_rng(828))
    nearest = ((points[:, None] - centres) ** 2).sum(axis=2).argmin(axis=1)
    assert np.bincount(nearest, minlength=5).min() > 0


def test_the_prompt_is_what_stands_before_the_answer(data):
    split = data.split("train")
    for text, example in zip(prompts_of(split, "prompt-response"), range(5), strict=False):
        assert len(text) == split.spans_of(example)[0, 0]
    assert [len(text) for text in prompts_of(split, "text")] == split.lengths.tolist()


@pytest.mark.parametrize(
    ("kind", "keys", "message"),
    [
        ("column", {"num_devices": 6}, "num_devices: 6, but 5 of the 6 values .* valid: .*num_devices of at most 5"),
        ("column", {"min_examples": 30}, "num_devices: 3, but 2 of the 6 values .*min_examples: 30 .* at most 2"),
        ("column", {"min_examples": 99}, "but 0 of .* valid: federation.min_examples of at most 60"),
        ("cluster", {"clusters": 99}, "federation.clusters: 99, but .* 3 different mixes of words; valid: at most 3"),
        ("iid", {"num_devices": 137}, "num_devices of at most 136"),
    ],
)
def test_what_cannot_be_is_refused_with_what_could(divided, kind, keys, message):
    with pytest.raises(ConfigError, match=message):
        divided(kind, **{"num_devices": 3, **keys})


def test_a_column_that_is_not_there_or_says_nothing_is_named(divided, world, tmp_path):
    for name, columns in (("none", {"device": None, "category": None}), ("one", {"device": "one", "category": "one"})):
        (tmp_path / name).mkdir()
        path = prepare_texts(tmp_path / name, world.parent / "backbone", **columns)
        found = {"none": "none", "one": "'same'"}[name]
        with pytest.raises(ConfigError, match=f"{found}.*`device:` in the task file"):
            divided("column", 2, path=path)
        for kind in ("dirichlet", "shards"):
            with pytest.raises(ConfigError, match=f"{found}.*`category:` in the task file .*or use column, iid"):
                divided(kind, 2, path=path)
        for kind in ("iid", "quantity", "cluster"):
            assert sum(map(len, divided(kind, 4, path=path, clusters=3).train)) == 136
    with pytest.raises(ConfigError, match="texts to be generated"):
        divided("column", 2, path=world.parent / "prepared")
