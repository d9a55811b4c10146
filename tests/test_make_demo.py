import csv
import functools
import hashlib
import importlib.util
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

DATA_PREP = Path(__file__).parent.parent / "data_prep"
TASK = yaml.safe_load((DATA_PREP / "tasks/demo.yaml").read_text())


def load_script():
    spec = importlib.util.spec_from_file_location("make_demo", DATA_PREP / "make_demo.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_demo"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


make_demo = load_script()
SMALL = {"train_examples": 120, "dev_examples": 40, "pretraining_texts": 600, "pretraining_steps": 3, "batch_size": 8}


def settings(seed=42, **changes):
    return make_demo.DemoSettings(seed=seed, **SMALL | changes)


def read_rows(path):
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream, delimiter="\t"))


def digests(out):
    names = ("data/train.tsv", "data/dev.tsv", "model/tokenizer.json", "model/model.safetensors")
    return {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in names}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    assert make_demo.make_demo(out, settings())
    return out


@pytest.mark.parametrize(("split", "count"), [("train", 120), ("validation", 40)])
def test_tables_have_the_columns_and_classes_of_the_task_file(demo, split, count):
    rows = read_rows(demo / "data" / TASK["splits"][split])
    assert len(rows) == count
    assert set(rows[0]) == set(TASK["columns"].values())
    assert {row["label"] for row in rows} == set(TASK["classes"])


def test_the_model_was_pretrained_on_the_class_words_of_the_task_file():
    assert TASK["classes"] == make_demo.ANSWERS


def test_no_dev_text_is_a_train_text(demo):
    train, dev = ({row["text"] for row in read_rows(demo / f"data/{name}.tsv")} for name in ("train", "dev"))
    assert not train & dev


def test_the_majority_class_is_a_little_larger_than_the_others():
    train, _ = make_demo.labelled_examples(make_demo.DemoSettings())
    labels = [label for _, label in train]
    shares = sorted(labels.count(label) / len(labels) for label in TASK["classes"])
    assert shares[0] > 0.25
    assert 0.35 < shares[-1] < 0.42


def test_class_words_are_single_tokens(demo):
    tokenizer = AutoTokenizer.from_pretrained(demo / "model")
    for word in TASK["classes"].values():
        assert len(tokenizer.encode(f" {word}", add_special_tokens=False)) == 1


def test_the_tokenizer_begins_with_bos_and_restores_the_text(demo):
    tokenizer = AutoTokenizer.from_pretrained(demo / "model")
    text = read_rows(demo / "data/dev.tsv")[0]["text"]
    tokens = tokenizer(text)["input_ids"]
    assert tokens[0] == tokenizer.bos_token_id
    assert tokenizer.pad_token_id not in tokens
    assert tokenizer.decode(tokens, skip_special_tokens=True) == text


def test_the_model_loads_and_has_grouped_query_attention(demo):
    model = AutoModelForCausalLM.from_pretrained(demo / "model")
    tokenizer = AutoTokenizer.from_pretrained(demo / "model")
    assert model.config.model_type == "llama"
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    logits = model(**tokenizer("the soup was fresh . It was", return_tensors="pt")).logits
    assert logits.shape[-1] == len(tokenizer)


def test_same_seed_gives_the_same_bytes(demo, tmp_path):
    assert make_demo.make_demo(tmp_path, settings())
    assert digests(tmp_path) == digests(demo)


def test_another_seed_gives_other_data_and_weights(demo, tmp_path):
    assert make_demo.make_demo(tmp_path, settings(seed=43))
    ours, theirs = digests(tmp_path), digests(demo)
    assert all(ours[name] != theirs[name] for name in ours)


def test_a_complete_directory_is_left_alone(demo):
    before = (demo / "model/model.safetensors").stat().st_mtime_ns
    assert not make_demo.make_demo(demo, settings())
    assert (demo / "model/model.safetensors").stat().st_mtime_ns == before


def test_an_interrupted_run_is_made_again_and_other_files_are_left_alone(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.tsv").write_text("text\tlab")
    (tmp_path / "data/other.tsv").write_text("not ours")
    assert make_demo.make_demo(tmp_path, settings(pretraining_steps=1))
    assert len(read_rows(tmp_path / "data/train.tsv")) == SMALL["train_examples"]
    assert (tmp_path / "data/other.tsv").read_text() == "not ours"


@pytest.mark.parametrize("damage", [make_demo.MARKER, *make_demo.FILES])
def test_a_missing_file_makes_a_directory_incomplete(demo, tmp_path, damage):
    copy = tmp_path / "copy"
    shutil.copytree(demo, copy)
    assert make_demo.is_complete(copy, settings())
    (copy / damage).unlink()
    assert not make_demo.is_complete(copy, settings())


def test_other_settings_are_not_taken_for_complete(demo):
    assert make_demo.is_complete(demo, settings())
    assert not make_demo.is_complete(demo, settings(seed=43))
    assert not make_demo.is_complete(demo, settings(pretraining_steps=4))


@pytest.mark.parametrize("content", ["", "{}", "[]"])
def test_a_marker_that_is_no_marker_counts_as_incomplete(demo, tmp_path, content):
    copy = tmp_path / "copy"
    shutil.copytree(demo, copy)
    (copy / make_demo.MARKER).write_text(content)
    assert not make_demo.is_complete(copy, settings())


def test_the_command_says_what_it_does_and_that_there_is_nothing_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(make_demo, "DemoSettings", functools.partial(make_demo.DemoSettings, **SMALL))
    make_demo.DemoSettings.seed = 42
    monkeypatch.setattr(sys, "argv", ["make_demo.py", "--out", str(tmp_path)])
    make_demo.main()
    first = capsys.readouterr().out
    assert "loss" in first
    assert "demo written to" in first
    make_demo.main()
    assert "nothing to do" in capsys.readouterr().out
