"""Prediction says of new text what evaluation said of the same text."""

import json
import shutil
from dataclasses import replace

import backbones
import h5py
import numpy as np
import pytest
import tiny
import torch
import yaml
from safetensors.numpy import load_file
from test_export import make_trained
from test_tasks import gpt_like

from fedhpc.checkpoint.files import LOCAL, files_of
from fedhpc.checkpoint.store import Checkpoints
from fedhpc.commands import cli
from fedhpc.commands.predict import _read, class_probabilities
from fedhpc.commands.trained import load_trained
from fedhpc.config.file import load_config
from fedhpc.data.prepared import tokenizer_fingerprint
from fedhpc.errors import DataError
from fedhpc.server.job import load_job


def start(world, folder, **sections):
    """Run the world's job in a folder of its own, with changes; the run directory."""
    config = {**yaml.safe_load(world.read_text()), "run_dir": str(folder / "run"), "trace": False}
    for section, changes in sections.items():
        config[section] = {**config[section], **changes}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    assert cli.main(["run", str(path)]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """A run in which at most 8 of 12 devices were trained; not to be changed."""
    changes = {"federation": {"rounds": 2, "sample_rate": 0.4}, "model": {"prepack_weights": True}}
    return start(world, tmp_path_factory.mktemp("finished"), **changes)


@pytest.fixture(scope="module")
def examples(world):
    """The validation split's source: (text, label)."""
    lines = (world.parent / "source/dev.tsv").read_text().splitlines()[1:]
    return [tuple(line.split("\t")) for line in lines]


@pytest.fixture
def predict(fedhpc):
    def command(*arguments):
        status, out, err = fedhpc("predict", *arguments)
        assert status == 0, err
        return [json.loads(line) for line in out.splitlines()]

    return command


def test_a_processor_that_cannot_prepack_weights_predicts(finished, predict, monkeypatch):
    def refuse(*_):
        raise RuntimeError("not here")

    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", refuse)
    assert predict(finished, "--text", "the place was dull")[0]["label"]


def test_a_damaged_file_of_a_device_leaves_what_does_not_need_it(finished, fedhpc, tmp_path):
    """Whether or not an older checkpoint shares the file, a run goes on from all files or not at all."""
    run_dir = shutil.copytree(finished, tmp_path / "run")
    checkpoints = Checkpoints(run_dir)
    newest, oldest = (files_of(checkpoints.device_files(position), LOCAL) for position in checkpoints.positions())
    damaged = next(device for device, (name, _) in newest.items() if oldest.get(device, [None])[0] == name)
    other = next(device for device in newest if device != damaged)
    file = checkpoints.path(checkpoints.positions()[0]) / newest[damaged][0]
    file.write_bytes(file.read_bytes()[:-1])
    again = ["run", run_dir / "config.yaml", "--set", f"run_dir={run_dir}", "--set", "federation.rounds=3"]
    for command in (again, ["predict", run_dir, "--text", "a", "--device", damaged]):
        status, _, err = fedhpc(*command)
        assert (status, "no checkpoint is whole" in err, file.name in err) == (2, True, True)
    for options in ([], ["--device", other]):
        expected = fedhpc("predict", finished, "--text", "the place was dull", *options)
        assert expected[0] == 0
        assert fedhpc("predict", run_dir, "--text", "the place was dull", *options)[:2] == expected[:2]
    assert fedhpc("export", run_dir, "--out", tmp_path / "out")[0] == 0


def last_metrics(run_dir):
    return json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])


def test_the_validation_texts_give_the_global_accuracy(predict, finished, examples, world):
    found = predict(finished, "--file", world.parent / "source/dev.tsv")
    assert [record["text"] for record in found] == [text for text, _ in examples]
    right = [record["label"] == label for record, (_, label) in zip(found, examples, strict=True)]
    assert sum(right) / len(right) == last_metrics(finished)["accuracy_global"]


def test_the_devices_own_texts_give_the_personalised_accuracy(predict, fedhpc, finished, examples, tmp_path):
    job = load_job(load_config(finished / "config.yaml"))
    right, untrained = 0, []
    for device, indices in enumerate(job.partition.validation):
        own = [examples[index] for index in indices]
        file = tmp_path / f"{device}.jsonl"
        file.write_text("\n".join(json.dumps({"a": text}) for text, _ in own))
        personal = ["--device", device]
        status, _, err = fedhpc("predict", finished, "--file", file, *personal)
        if status:
            assert f"--device {device}: has not been trained up to round 2; those that have: " in err
            untrained.append(device)
            personal = []
        found = predict(finished, "--file", file, *personal)
        right += sum(record["label"] == label for record, (_, label) in zip(found, own, strict=True))
    seen = {device for line in (finished / "metrics.jsonl").open() for device in json.loads(line)["devices"]}
    assert set(untrained) == set(range(tiny.NUM_DEVICES)) - seen
    assert right / len(examples) == last_metrics(finished)["accuracy"]
    assert last_metrics(finished)["accuracy"] != last_metrics(finished)["accuracy_global"]


def test_every_form_of_input_gives_the_same(predict, finished, tmp_path):
    texts = ["the place was calm", "the place was dull and slow"]
    (tmp_path / "texts.txt").write_text("\n".join(texts) + "\n")
    (tmp_path / "texts.tsv").write_text("id\ttext\n" + "".join(f"{i}\t{text}\n" for i, text in enumerate(texts)))
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"sentence": text}) + "\n" for text in texts))
    (tmp_path / "texts.NDJSON").write_text((tmp_path / "texts.jsonl").read_text())
    expected = predict(finished, "--text", texts[0], "--text", texts[1])
    assert [record["text"] for record in expected] == texts
    for name in ("texts.txt", "texts.tsv", "texts.jsonl", "texts.NDJSON"):
        assert predict(finished, "--file", tmp_path / name) == expected
    assert predict(finished, "--text", texts[0], "--out", tmp_path / "out.jsonl") == []
    (written,) = (tmp_path / "out.jsonl").read_text().splitlines()
    assert json.loads(written)["label"] == expected[0]["label"]


def test_all_classes_have_a_probability(predict, finished):
    (found,) = predict(finished, "--text", "the place was calm", "--all-classes")
    assert list(found["probabilities"]) == list(tiny.TASK["classes"])
    assert sum(found["probabilities"].values()) == pytest.approx(1, abs=1e-6)
    assert found["probability"] == max(found["probabilities"].values()) == found["probabilities"][found["label"]]


@pytest.mark.parametrize("max_length", [20, 128])
def test_too_long_a_text_is_cut(finished, max_length):
    """As in preparation, and where a text within that has no place in the backbone's 64 positions, to those."""
    trained = load_trained(str(finished))
    trained.job.data.description = replace(trained.job.data.description, max_length=max_length)
    num_words = min(max_length, 64 - tiny.NUM_TOKENS) - 3  # <s> ... It was
    exact = ["calm", *["dull"] * (num_words - 2), "bright"]
    texts = [exact, [*exact, "plain"], exact + 300 * ["plain"], exact[:-1]]
    found = class_probabilities(trained, [{"a": " ".join(words)} for words in texts])
    assert np.allclose(found[1:3], found[0], rtol=0, atol=1e-6)
    assert not np.allclose(found[3], found[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("head", "words"), [("linear", None), ("verbalizer", [[7], [4, 9, 12], [5]])])
def test_a_cut_text_fits_with_what_stands_beside_it(tmp_path, head, words):
    """GPT-2 has a row for each of its 64 positions and no more."""
    tokenizer = gpt_like()
    path = backbones.save_backbone(tmp_path, "gpt2", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(path)
    description = replace(
        backbones.describe("gpt2", words=words or [[]] * 3, head=head, longest=128),
        template="{a}",
        tokenizer_sha256=tokenizer_fingerprint(tokenizer),
    )
    trained = make_trained(path, description)
    letters = "abcdefgh" * 20
    num_letters = 64 - backbones.NUM_TOKENS - (0 if head == "linear" else 2)
    whole, cut, shorter = class_probabilities(
        trained, [{"a": letters}, {"a": letters[:num_letters]}, {"a": letters[: num_letters - 1]}]
    )
    assert np.allclose(whole, cut, rtol=0, atol=1e-6)
    assert not np.allclose(whole, shorter, rtol=0, atol=1e-4)


def test_a_token_that_the_model_does_not_know_is_told_by_its_text(tmp_path):
    tokenizer = gpt_like()
    path = backbones.save_backbone(tmp_path, "gpt2", vocab_size=len(tokenizer))
    tokenizer.add_tokens(["added"])
    tokenizer.save_pretrained(path)
    description = replace(backbones.describe("gpt2"), template="{a}", tokenizer_sha256=tokenizer_fingerprint(tokenizer))
    rows = [{"a": "a b"}, {"a": "a added word"}]
    with pytest.raises(DataError, match=rf"text 1: its token {len(tokenizer) - 1} \('added'\) has no row"):
        class_probabilities(make_trained(path, description), rows)


def test_a_task_of_two_texts_takes_two(fedhpc, predict, world, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    columns = {"a": "first", "b": "second", "label": "label"}
    task = {**tiny.TASK, "columns": columns, "template": {"decoder": "{a} and {b} It was {word} ."}}
    (source / "task.yaml").write_text(yaml.safe_dump(task))
    lines = ["first\tsecond\tlabel"]
    lines += [f"the {word}\tplace\t{label}" for label, words in tiny.WORDS.items() for word in words]
    for split in ("train", "dev"):
        (source / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    model = yaml.safe_load(world.read_text())["model"]["name"]
    arguments = ["--task", source / "task.yaml", "--source", source, "--model", model, "--out", tmp_path / "prepared"]
    assert tiny.load_script("prepare").main([str(argument) for argument in arguments]) == 0
    federation = {"rounds": 1, "num_devices": 2, "partition": "iid"}
    run_dir = start(world, tmp_path, data={"path": str(tmp_path / "prepared")}, federation=federation)
    (tmp_path / "new.tsv").write_text("a\tb\nthe calm\tplace\n")
    given = predict(run_dir, "--text", "the calm", "place")
    assert given[0]["text"] == {"a": "the calm", "b": "place"}
    assert predict(run_dir, "--file", tmp_path / "new.tsv") == given
    assert "this task takes 2: a, b; write --text A B" in fedhpc("predict", run_dir, "--text", "alone")[2]
    (tmp_path / "new.txt").write_text("alone\n")
    assert "this task takes a, b" in fedhpc("predict", run_dir, "--file", tmp_path / "new.txt")[2]


FILES = {
    "no_column.tsv": ("body\tlabel\nthe place\tgood\n", "line 2: no column 'a' or 'text' or 'sentence'"),
    "ragged.tsv": ("text\tlabel\nthe place\n", "line 2: 1 columns, expected 2"),
    "empty.tsv": ("text\nthe place\n \n", "line 3: holds no text"),
    "header.tsv": ("text\n", "header.tsv: holds no text"),
    "number.jsonl": ('{"text": 3}\n', "line 1: column 'text' holds 3, expected text"),
    "broken.jsonl": ('{"text": "a"}\n{\n', "line 2: "),
    "half_a_character.jsonl": (
        '{"text": "a \\ud83d"}\n',
        "line 1: column 'text' is not Unicode text: 'utf-8' codec can't encode",
    ),
    "table.CSV": ('text,label\n"the\nplace",good\n" ",good\n', "line 4: holds no text"),
    "table.XLSX": ("", ".xlsx is not read; give TSV or CSV with a header line, JSON lines, or Parquet"),
    "twice.jsonl": ('{"text": "a", "text": "b"}\n', "line 1: key 'text' stands twice in an object"),
    "deep.jsonl": ('{"text": ' + 5000 * "[", "line 1: nested too deeply"),
    "blanks.tsv": ("text\n\n\nthe place\n\n", "line 2: holds no text, nor do 2 others"),
    "blank.txt": ("the place\n\nwas calm\n", "line 2: holds no text"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_bad_file_is_told_by_line(fedhpc, finished, tmp_path, name):
    content, message = FILES[name]
    (tmp_path / name).write_text(content)
    status, out, err = fedhpc("predict", finished, "--file", tmp_path / name)
    assert (status, out) == (2, "")
    assert message in err
    assert str(tmp_path / name) in err


def test_every_form_of_table_gives_the_same_answers(fedhpc, finished, tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"text": "the place was calm"}, {"text": "dull"}]
    (tmp_path / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "new.csv").write_text('text\n"the place was calm"\ndull\n')
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "new.parquet")
    answers = {fedhpc("predict", finished, "--file", tmp_path / f"new{end}") for end in (".jsonl", ".csv", ".parquet")}
    assert len(answers) == 1
    assert answers.pop()[1].count("probability") == 2


def test_the_original_files_of_a_task_are_read_as_in_preparation(tmp_path):
    cola = replace(backbones.describe("bert"), task="cola", class_names=["0", "1"])
    for name, content, number in (
        ("without.tsv", "gj04\t1\t\tthe place\ngj04\t0\t*\ta calm\n", 1),
        ("with.tsv", "sentence\tlabel\nthe place\t1\na calm\t0\n", 2),
        ("other.tsv", "id\tnumber\tsentence\tby\n1\t2\tthe place\tx\n1\t2\ta calm\ty\n", 2),
    ):
        (tmp_path / name).write_text(content)
        texts = _read(tmp_path / name, cola, ["a"])
        assert texts.rows == [{"a": "the place"}, {"a": "a calm"}]
        assert texts.place(1) == f"{tmp_path / name} line {number + 1}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", " "], "--text 1: holds no text"),
        (["--text", "a", "b"], "--text 1: 2 texts given, this task takes 1: a"),
        (["--file", "nowhere.tsv"], "nowhere.tsv: cannot be read: No such file"),
        (["--text", "a", "--device", "12"], "--device 12: this run has the devices 0 to 11"),
        (["--text", "a", "--out", "no/such/folder/out"], "--out: no/such/folder/out cannot be written"),
    ],
)
def test_bad_arguments_are_refused(fedhpc, finished, arguments, message):
    status, _, err = fedhpc("predict", finished, *arguments)
    assert status == 2
    assert message in err


@pytest.mark.parametrize("command", ["predict", "export"])
def test_what_cannot_be_read_is_named(fedhpc, finished, tmp_path, command):
    rest = ["--text", "a"] if command == "predict" else ["--out", tmp_path / "out"]

    def refusal(run_dir):
        status, _, err = fedhpc(command, run_dir, *rest)
        assert status == 2
        return err

    assert f"{tmp_path} holds no config.yaml" in refusal(tmp_path)
    assert "nowhere is no folder" in refusal(tmp_path / "nowhere")
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    config = yaml.safe_load((copy / "config.yaml").read_text())
    for section, key, message in (("model", "name", "no folder"), ("data", "path", "is no directory")):
        changed = {**config, section: {**config[section], key: str(tmp_path / "gone")}}
        (copy / "config.yaml").write_text(yaml.safe_dump(changed))
        assert f"{tmp_path / 'gone'}" in (err := refusal(copy))
        assert message in err
    (copy / "config.yaml").write_text(yaml.safe_dump(config))
    shutil.rmtree(copy / "checkpoints")
    assert f"{copy} has no checkpoint yet" in refusal(copy)


def test_a_device_of_the_warm_up_alone_has_no_personal_parameters(fedhpc, world, tmp_path):
    automatic, keeping = {"ratio": "auto", "warmup_rounds": 1}, {"reset_moments": False}
    federation = {"rounds": 2, "sample_rate": 0.4}
    run_dir = start(world, tmp_path, federation=federation, selection=automatic, device=keeping)
    first, second = (set(json.loads(line)["devices"]) for line in (run_dir / "metrics.jsonl").open())
    for device in first | second:
        status, _, err = fedhpc("predict", run_dir, "--text", "a", "--device", device)
        assert status == (0 if device in second else 2)
        assert ("it was trained in the warm-up of selection.ratio: auto only" in err) == (device not in second)
    assert first - second


@pytest.mark.parametrize("selection", [{"strategy": "all"}, {"strategy": "last", "local_layers": "frozen"}], ids=str)
def test_a_run_that_exchanges_everything_has_no_personal_parameters(fedhpc, world, tmp_path, selection):
    run_dir = start(world, tmp_path, federation={"rounds": 1}, selection=selection)
    status, _, err = fedhpc("predict", run_dir, "--text", "a", "--device", 0)
    assert status == 2
    assert "this run exchanges everything it trains" in err


def test_a_run_is_exported_with_its_readme(fedhpc, finished, tmp_path):
    status, out, _ = fedhpc("export", finished, "--format", "peft", "--out", tmp_path / "adapter")
    assert status == 0
    assert "global parameters after round 2 as PREFIX_TUNING" in out
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    status, _, err = fedhpc("export", finished, "--out", tmp_path / "adapter")
    assert status == 2
    assert "is there already" in err


def test_a_devices_adapter_differs_from_the_global_one_where_layers_stay_at_home(fedhpc, finished, tmp_path):
    device = json.loads((finished / "metrics.jsonl").read_text().splitlines()[0])["devices"][0]
    prompts = []
    for name, personal in (("global", []), ("personal", ["--device", device])):
        assert fedhpc("export", finished, "--out", tmp_path / name, *personal)[0] == 0
        flat = load_file(tmp_path / name / "adapter_model.safetensors")["prompt_embeddings"]
        prompts.append(flat.reshape(tiny.NUM_TOKENS, tiny.NUM_LAYERS, 2, tiny.KEY_WIDTH))
    differing = [layer for layer in range(tiny.NUM_LAYERS) if (prompts[0] != prompts[1])[:, layer].all()]
    assert f"parameters of device {device}" in (tmp_path / "personal/README.md").read_text()
    (server,) = (finished / "checkpoints").glob("round_000002/server.h5")
    with h5py.File(server) as file:
        assert differing == sorted({*range(tiny.NUM_LAYERS)} - {*file["selection/layers"][:].tolist()})
