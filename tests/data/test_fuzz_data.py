"""Hundreds of odd data sets: each is refused with one message, or means the same to preparation and to prediction."""

import json
from collections import Counter
from dataclasses import replace

import backbones
import numpy as np
import pytest
import torch
import yaml
from test_export import make_trained
from test_tasks import bert_like, gpt_like, llama_like, roberta_like
from tiny import load_script

from fedhpc.commands import cli, predict
from fedhpc.data.prepared import PreparedData
from fedhpc.evaluate.predictions import class_scores, evaluation_batches
from fedhpc.model.backbone import Backbone
from fedhpc.tuning.base import as_parameters

SEED = 20260731
TRIALS = 25
"""Of each kind."""
ACCEPTED, REFUSED = "accepted", "refused"
TOKENIZERS = {"bert": bert_like, "roberta": roberta_like, "gpt2": gpt_like, "llama": llama_like}
COLUMNS = {"one": {"a": "text", "label": "label"}, "two": {"a": "a", "b": "b", "label": "label"}}
CLASSES = {"bad": "terrible", "good": "great"}
PIECES = (
    *("b c", "great", "It was", "東京", "naïve", "\U0001d518", "e\u0301", "\u200d", "\u202e", "\u00a0", "\u3000"),
    *("\u2028", "\x85", "\x1c", "\x0b", "\x00", "\ufeff", "\ufffe", "\r", '"', "'", "\\t", "\\", "{a}", "{word}", "{"),
    *("<mask>", "[MASK]", "[SEP]", "<s>", "</s>", "<end>", "<sep>", "added", "NaN", "null", "0", "-", "#"),
    *("b" * 300, "the " * 150),
)
VALUES = (3, 0, -1, 1.0, True, None, float("nan"), float("inf"), 10**30, [], ["a"], {}, {"text": "a"}, "", "\ud83d")
CHUNKS = ("", " ", "\t", "\n", "\r", "\r\n\r\n", "\ufeff", "\x00", "{", "[]", "null", "1e999", '"text"', "a\tb", "'")

prepare, partition = load_script("prepare"), load_script("partition")


def some(rng, options):
    return options[int(rng.integers(len(options)))]


def now_and_then(rng, share=0.1):
    return rng.random() < share


def text(rng):
    if now_and_then(rng, 0.02):
        return some(rng, ("", " ", "\u3000"))
    return " ".join(some(rng, PIECES) if now_and_then(rng, 0.3) else "a" for _ in range(rng.integers(1, 6)))


def label(rng):
    name = some(rng, list(CLASSES))
    return some(rng, (name.upper(), f" {name}", "", "other", "0")) if now_and_then(rng, 0.02) else name


def table(rng, columns):
    """A TSV file."""
    header = [*columns, *(["id"] if now_and_then(rng, 0.3) else [])]
    header = [str(name) for name in rng.permutation(header)] if now_and_then(rng, 0.3) else header
    rows = [[label(rng) if name == "label" else text(rng) for name in header] for _ in range(rng.integers(1, 9))]
    if now_and_then(rng, 0.05):
        rows[-1] = some(rng, (rows[-1][:-1], [*rows[-1], "more"], []))
    if now_and_then(rng, 0.05):
        header = some(rng, ([], header[:-1], [name.upper() for name in header], [*header, header[0]]))
    return in_bytes(rng, ["\t".join(cells) for cells in (header, *rows)])


def json_lines(rng, columns):
    """A file with a JSON object a line."""
    rows = []
    for _ in range(rng.integers(1, 9)):
        record = {name: label(rng) if name == "label" else text(rng) for name in columns}
        record |= {"more": some(rng, VALUES)} if now_and_then(rng) else {}
        record |= {some(rng, columns): some(rng, VALUES)} if now_and_then(rng, 0.03) else {}
        row = json.dumps(record, ensure_ascii=now_and_then(rng, 0.5))
        odd = (f"[{row}]", row[:-1], f"{row},", row.replace('"', "'"), "[" * 5000, f'{row[:-1]}, "label": "bad"}}', "")
        rows.append(some(rng, odd) if now_and_then(rng, 0.02) else row)
    return in_bytes(rng, rows)


def in_bytes(rng, rows):
    end = "\r\n" if now_and_then(rng) else "\n"
    content = end.join(rows) + end * some(rng, (0, 1, 1, 1, 1, 1, 1, 1, 1, 2))
    if now_and_then(rng, 0.05):
        place = int(rng.integers(len(content) + 1))
        content = content[:place] + some(rng, CHUNKS) + content[place:]
    encodings = ("utf-8-sig", "utf-8-sig", "utf-16", "utf-32-le")
    return content.encode(some(rng, encodings) if now_and_then(rng) else "utf-8", "surrogatepass")


def odd_yaml(rng, value):
    """The text of a task file with something odd in it."""

    def spoil(value):
        if not now_and_then(rng, 0.07):
            return {spoil_key(key): spoil(item) for key, item in value.items()} if isinstance(value, dict) else value
        return some(rng, (*VALUES, *PIECES, "{a} <mask>", "{a} {word}", "{c} <mask> {word}", "{a!r} <mask>", [value]))

    def spoil_key(key):
        return some(rng, (*PIECES, "", 0, True, None, "\ud83d")) if now_and_then(rng, 0.03) else key

    content = yaml.safe_dump(spoil(value), allow_unicode=now_and_then(rng, 0.5))
    if now_and_then(rng, 0.3):
        place = int(rng.integers(len(content) + 1))
        odd = (
            "&a [*a]",
            "!!python/name:os.system",
            '"\\ud83d"',
            "[" * 3000,
            "? ",
            "- ",
            "\t",
            "*b",
            "<<: ",
            "---\n",
            "%",
            "|\n",
        )
        content = content[:place] + some(rng, (*CHUNKS, *odd)) + content[place:]
    return content.encode("utf-16" if now_and_then(rng, 0.02) else "utf-8", "surrogatepass")


class World:
    """Small random backbones, sound data for each, and parameters as a run would have tuned them."""

    def __init__(self, folder):
        self.folder, self.models, self.tokenizers, self.made = folder, {}, {}, {}
        for name, make in TOKENIZERS.items():
            tokenizer = make()
            self.models[name] = str(backbones.save_backbone(folder, name, vocab_size=len(tokenizer)))
            tokenizer.add_tokens(["added"])  # without a row in the embeddings
            tokenizer.save_pretrained(self.models[name])
            self.tokenizers[name] = tokenizer
        for columns in COLUMNS:
            (folder / columns).mkdir()
            rows = [{"a": "a", "b": "c", "text": "b", "label": label} for label in CLASSES]
            for split in ("train", "dev"):
                (folder / columns / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def plain_tokens(self, case, text):
        """What transformers' tokenizer makes of the fields of an example."""
        (name, columns, head), tokenizer = case, self.tokenizers[case[0]]
        fields = [field.strip() for field in (text.values() if columns == "two" else [text])]
        if name in backbones.ENCODERS:
            shown = f"{' and '.join(fields)} . It was {tokenizer.mask_token} ."
            bare = tuple(fields) if columns == "two" else fields[0]
            return tokenizer([shown if head == "verbalizer" else bare])["input_ids"][0]
        shown = f"{' and '.join(fields)} It was" if head == "verbalizer" else " ".join(fields)
        ids = tokenizer(shown)["input_ids"]
        return (ids[:-1] if name == "llama" else ids) or [tokenizer.eos_token_id]  # that one ends a text with </s>

    def prepare(self, capfd, case, source, out, *more, task=None):
        """What prepare.py says of a source; its task file is the usual one unless it is given."""
        name, columns, head = case
        for split in ("train", "dev"):
            if not any(source.glob(f"{split}.*")):
                (source / f"{split}.jsonl").write_bytes((self.folder / columns / f"{split}.jsonl").read_bytes())
        train = next(source.glob("train.*"))
        (source / "task.yaml").write_bytes(task or yaml.safe_dump(task_of(columns, train.name)).encode())
        arguments = ["--task", source / "task.yaml", "--source", source, "--model", self.models[name], "--head", head]
        return call(capfd, prepare.main, *arguments, "--out", out, *more)

    def trained(self, capfd, case):
        """Random parameters for sound data, and the backbone."""
        if case not in self.made:
            out = self.folder / "_".join(case)
            assert self.prepare(capfd, case, self.folder / case[1], out)[0] == 0
            trained = make_trained(self.models[case[0]], PreparedData.open(out, verify=True).description)
            config, description = trained.job.config, trained.job.data.description
            self.made[case] = trained, Backbone(config.model, config.tuning, description, torch.device("cpu"))
        return self.made[case]

    def predict(self, capfd, monkeypatch, case, max_length, *arguments):
        """What predict says, with random parameters."""
        trained, backbone = self.trained(capfd, case)
        trained.job.data.description = replace(trained.job.data.description, max_length=max_length)
        monkeypatch.setattr(predict, "load_trained", lambda *_: trained)
        monkeypatch.setattr(predict, "backbone_of", lambda _: backbone)
        return call(capfd, cli.main, "predict", "run", "--all-classes", *arguments)


def task_of(columns, train):
    shown = "{a} and {b}" if columns == "two" else "{a}"
    return {
        "task": "moods",
        "columns": COLUMNS[columns],
        "classes": CLASSES,
        "template": {"encoder": f"{shown} . It was <mask> .", "decoder": f"{shown} It was {{word}} ."},
        "splits": {"train": train, "validation": "dev.jsonl"},
    }


def call(capfd, main, *arguments):
    """Exit status, standard output and the message of a command; it is a fault if there is no message, or another."""
    capfd.readouterr()
    try:
        status = main([str(argument) for argument in arguments])
    except SystemExit as error:  # of argparse
        status = error.code
    out, err = capfd.readouterr()
    assert "Traceback" not in err, err
    assert status in (0, 2), err
    messages = [line for line in err.splitlines() if "error: " in line]
    assert len(messages) == (status == 2), err
    return status, out, "".join(messages)


def case_of(rng):
    return some(rng, list(TOKENIZERS)), some(rng, list(COLUMNS)), some(rng, ("verbalizer", "verbalizer", "linear"))


def odd_data(world, rng, folder, capfd, monkeypatch):
    """An odd training file: preparation and prediction accept the same, and compute the same from it."""
    case, max_length = case_of(rng), int(rng.integers(8, 70))
    suffix = some(rng, ("tsv", "TSV", "jsonl", "json", "ndjson"))
    train = folder / f"train.{suffix}"
    columns = list(COLUMNS[case[1]].values())
    train.write_bytes(table(rng, columns) if suffix.lower() == "tsv" else json_lines(rng, columns))
    status, _, message = world.prepare(capfd, case, folder, folder / "out", "--max-length", max_length)
    found, out, said = world.predict(capfd, monkeypatch, case, max_length, "--file", train)
    assert (folder / "out").exists() == (status == 0)
    if status or found:
        assert status, said
        assert found or "label" in message, message  # predict has no use for labels
        return REFUSED
    data = PreparedData.open(folder / "out", verify=True)
    trained, backbone = world.trained(capfd, case)
    if data.description.splits["train"]["longest"] > trained.max_length:
        return "needs more positions than there are"
    split, params = data.split("train"), as_parameters(trained.tensors, backbone.torch_device)
    batches = [[(params, batch)] for batch in evaluation_batches(split, np.arange(len(split)), 4)]
    expected = np.empty((len(split), len(CLASSES)))
    for examples, scores in class_scores(backbone, trained.job.tuning, split, batches):
        expected[examples] = scores.softmax(1).numpy()
    records = [json.loads(line) for line in out.removesuffix("\n").split("\n")]
    assert np.allclose([list(record["probabilities"].values()) for record in records], expected, rtol=0, atol=1e-5)
    for record, start, end in zip(records, split.offsets, split.offsets[1:], strict=False):
        whole = world.plain_tokens(case, record["text"])
        assert end - start == max_length < len(whole) or split.tokens[start:end].tolist() == whole
    return ACCEPTED


def odd_task(world, rng, folder, capfd, monkeypatch):
    """An odd task file."""
    case = case_of(rng)
    task = odd_yaml(rng, task_of(case[1], "train.jsonl"))
    status, _, _ = world.prepare(capfd, case, folder, folder / "out", task=task)
    return REFUSED if status else ACCEPTED


def odd_texts(world, rng, folder, capfd, monkeypatch):
    """New texts on the command line, and in a file of one a line."""
    case, max_length = case_of(rng), int(rng.integers(8, 70))
    texts = [text(rng) + (some(rng, ("\udc80", "\ud83d")) if now_and_then(rng, 0.03) else "") for _ in range(3)]
    if case[1] == "one" and now_and_then(rng, 0.5):
        file = folder / some(rng, ("new.txt", "new", "new.csv", "new.tsv", "new.TXT"))
        file.write_bytes(in_bytes(rng, texts))
        arguments = ["--file", file]
    else:
        times = 2 if case[1] == "two" else 1
        arguments = [part for value in texts for part in ("--text", *[value.replace("\x00", "") or " "] * times)]
    status, _, _ = world.predict(capfd, monkeypatch, case, max_length, *arguments)
    return REFUSED if status else ACCEPTED


def odd_options(world, rng, folder, capfd, monkeypatch):
    """Sound data and odd options, for prepare.py and partition.py."""
    case = case_of(rng)
    world.trained(capfd, case)
    numbers = (
        "1",
        "2",
        "3",
        "1",
        "2",
        "3",
        "0",
        "-1",
        "1e3",
        "",
        "nan",
        "inf",
        "0.5",
        "1e-300",
        "1e300",
        str(10**30),
        "٣",
        "two",
    )
    options = {"--max-length": numbers, "--limit-train": numbers, "--seed": numbers}
    if now_and_then(rng, 0.5):
        chosen = [f"{name}={some(rng, numbers)}" for name in options if now_and_then(rng, 0.5)]
        status, _, _ = world.prepare(capfd, case, folder, folder / some(rng, ("out", "a/b", "é \n")), *chosen)
    else:
        options = {
            "--num-devices": ("1", *numbers),
            "--alpha": numbers,
            "--shards-per-device": numbers,
            "--seed": numbers,
        }
        options |= {
            "--partition": ("iid", "shards", "dirichlet", "other"),
            "--table": (folder / "t", folder, folder / "no/t"),
        }
        chosen = [f"{name}={some(rng, values)}" for name, values in options.items() if now_and_then(rng, 0.4)]
        prepared = world.folder / "_".join(case)
        status, _, _ = call(capfd, partition.main, "--data", prepared, "--num-devices", "1", *chosen)
    return REFUSED if status else ACCEPTED


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("kind", [odd_data, odd_task, odd_texts, odd_options])
def test_odd_input_is_refused_with_one_message_or_means_what_it_says(world, tmp_path, capfd, monkeypatch, kind):
    outcomes = Counter()
    for number in range(TRIALS):
        folder = tmp_path / str(number)
        folder.mkdir()
        outcomes[kind(world, np.random.default_rng([SEED, number]), folder, capfd, monkeypatch)] += 1
    print(f"{kind.__name__}: {dict(outcomes)}")
    assert min(outcomes[ACCEPTED], outcomes[REFUSED]) >= TRIALS // 8, outcomes
