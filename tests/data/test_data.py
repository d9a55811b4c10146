import json
import os

import numpy as np
import pytest
import torch

from fedhpc.data.prepared import Description, PreparedData, Split, check_writable, write_prepared
from fedhpc.errors import DataError

FIELDS = {
    "task": "toy",
    "head": "verbalizer",
    "kind": "encoder",
    "model": "toy/bert",
    "tokenizer_sha256": "0" * 64,
    "pad_id": 9,
    "max_length": 16,
    "template": "{a} <mask>",
    "class_names": ["no", "yes"],
    "class_words": ["bad", "good"],
    "word_ids": [[3], [4]],
    "metric": "accuracy",
}
EXAMPLES = [[1, 2, 3], [4], [5, 6, 7, 8, 1]]


def make_split(examples=EXAMPLES):
    return Split(
        tokens=np.concatenate(examples),
        offsets=np.cumsum([0, *map(len, examples)]),
        labels=np.arange(len(examples)) % 2,
        slots=np.array([len(example) - 1 for example in examples]),
        pad_id=9,
    )


@pytest.fixture
def prepared(tmp_path):
    path = tmp_path / "deep" / "prepared"
    write_prepared(path, FIELDS, {"train": make_split(), "validation": make_split(EXAMPLES[:2])})
    return path


def test_what_is_written_is_read_back(prepared):
    data = PreparedData.open(prepared, verify=True)
    assert data.description.splits["train"] == {"examples": 3, "tokens": 9, "longest": 5, "class_counts": [2, 1]}
    assert {name: getattr(data.description, name) for name in FIELDS} == FIELDS
    split = data.split("train")
    assert isinstance(split.tokens, np.memmap)
    assert (len(split), split.labels.tolist(), split.lengths.tolist()) == (3, [0, 1, 0], [3, 1, 5])
    assert len(data.split("validation")) == 2
    dtypes = [getattr(split, part).dtype.name for part in ("tokens", "offsets", "labels", "slots")]
    assert dtypes == ["int32", "int64", "int32", "int32"]


def test_a_path_that_is_not_unicode_makes_the_round_trip(tmp_path):
    fields = {**FIELDS, "model": os.fsdecode(b"m\xffdel"), "class_words": ["東京", "good"]}
    write_prepared(tmp_path / "out", fields, {"train": make_split()})
    assert PreparedData.open(tmp_path / "out", verify=True).description.model == fields["model"]
    assert "東京" in (tmp_path / "out/description.json").read_text(encoding="utf-8")


def test_description_makes_the_round_trip(prepared, tmp_path):
    description = PreparedData.open(prepared, verify=False).description
    (tmp_path / "copy.json").write_text(description.to_json(), encoding="utf-8")
    assert Description.load(tmp_path / "copy.json") == description


def test_batch_is_padded_to_its_own_longest_in_the_asked_order(prepared):
    batch = PreparedData.open(prepared, verify=False).split("train").batch([1, 0])
    assert batch.input_ids.tolist() == [[4, 9, 9], [1, 2, 3]]
    assert batch.attention_mask.tolist() == [[True, False, False], [True, True, True]]
    assert (batch.slots.tolist(), batch.labels.tolist()) == ([0, 2], [1, 0])
    types = [batch.input_ids.dtype, batch.attention_mask.dtype, batch.slots.dtype, batch.labels.dtype]
    assert types == [torch.int64, torch.bool, torch.int64, torch.int64]
    assert batch.to(torch.device("meta")).labels.device.type == "meta"


def _shorten(path):
    path.write_bytes(path.read_bytes()[:-4])


def _flip_last_byte(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_missing_directory_and_missing_description(tmp_path):
    with pytest.raises(DataError, match=r"nowhere is no directory.*fedhpc prepare"):
        PreparedData.open(tmp_path / "nowhere", verify=False)
    with pytest.raises(DataError, match=r"holds no description\.json"):
        PreparedData.open(tmp_path, verify=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_shorten, r"cut short: .*train\.tokens\.npy has 160 bytes, description says 164; run"),
        (lambda path: path.unlink(), r"train\.tokens\.npy: missing; run"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "too long"),
    ],
)
def test_damaged_files_are_found_without_reading_them(prepared, change, message):
    change(prepared / "train.tokens.npy")
    with pytest.raises(DataError, match=message):
        PreparedData.open(prepared, verify=False)


def test_altered_content_is_found_by_verification_alone(prepared):
    _flip_last_byte(prepared / "train.labels.npy")
    PreparedData.open(prepared, verify=False)
    with pytest.raises(DataError, match=r"altered: .*train\.labels\.npy"):
        PreparedData.open(prepared, verify=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: "{", "not valid JSON"),
        (lambda content: "[]", "expected format 'fedhpc-prepared' version 1"),
        (lambda content: json.dumps(content | {"version": 2}), "found 'fedhpc-prepared' version 2"),
        (lambda content: json.dumps(content | {"extra": 1, "pad_id": "x"}), "wrong type: extra, pad_id"),
        (lambda content: json.dumps({key: content[key] for key in content if key != "task"}), "wrong type: task"),
    ],
)
def test_invalid_descriptions_are_refused(prepared, change, message):
    file = prepared / "description.json"
    file.write_text(change(json.loads(file.read_text())))
    with pytest.raises(DataError, match=message):
        PreparedData.open(prepared, verify=False)


def test_files_that_are_not_what_they_should_be(prepared):
    data = PreparedData.open(prepared, verify=False)
    with pytest.raises(DataError, match="no split 'test', only train, validation"):
        data.split("test")
    np.save(prepared / "train.slots.npy", np.zeros(3))
    with pytest.raises(DataError, match=r"float64 \(3,\) is not a list of int32"):
        data.split("train")
    np.save(prepared / "train.slots.npy", np.array([None]), allow_pickle=True)
    with pytest.raises(DataError, match=r"not a readable \.npy file"):
        data.split("train")
    np.save(prepared / "train.slots.npy", np.zeros(3))
    content = (prepared / "train.slots.npy").read_bytes()
    (prepared / "train.slots.npy").write_bytes(content.replace(b"{'descr'", b"{('descr"))
    with pytest.raises(DataError, match=r"not a readable \.npy file"):
        data.split("train")
    np.save(prepared / "train.slots.npy", np.zeros(2, np.int32))
    with pytest.raises(DataError, match="do not fit together"):
        data.split("train")
    np.save(prepared / "validation.tokens.npy", np.zeros(3, np.int32))
    with pytest.raises(DataError, match="do not fit together"):
        data.split("validation")


def test_a_prepared_directory_is_replaced(prepared):
    old = PreparedData.open(prepared, verify=False).split("train")
    write_prepared(prepared, FIELDS, {"train": make_split(EXAMPLES[:1])})
    assert PreparedData.open(prepared, verify=True).description.splits.keys() == {"train"}
    assert not (prepared / "validation.labels.npy").exists()
    assert old.batch([2]).input_ids.tolist() == [EXAMPLES[2]]  # a reader of the old one is not disturbed
    assert [entry.name for entry in prepared.parent.iterdir()] == ["prepared"]


def test_failure_leaves_the_old_directory(prepared, monkeypatch):
    monkeypatch.setattr("fedhpc.data.prepared.np.save", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_prepared(prepared, FIELDS, {"train": make_split()})
    assert len(PreparedData.open(prepared, verify=True).split("train")) == 3
    assert [entry.name for entry in prepared.parent.iterdir()] == ["prepared"]


def test_what_is_not_ours_is_never_replaced(prepared, tmp_path):
    (tmp_path / "empty").mkdir()
    check_writable(tmp_path / "empty")
    (tmp_path / "notes.txt").write_text("precious")
    with pytest.raises(DataError, match="other than prepared data; give a new directory"):
        write_prepared(tmp_path, FIELDS, {"train": make_split()})
    with pytest.raises(DataError, match="is a file"):
        check_writable(tmp_path / "notes.txt")
    (prepared / "notes.txt").write_text("precious")
    with pytest.raises(DataError, match=r"also holds notes\.txt"):
        check_writable(prepared)
    (prepared / "notes.txt").unlink()
    (prepared / "description.json").write_text('{"format": "another"}')
    with pytest.raises(DataError, match="other than prepared data"):
        check_writable(prepared)
