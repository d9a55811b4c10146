"""fedhpc init: what it writes for a user's own data can be run, and what is wrong with them is said."""

import json
import shlex
import subprocess

import pytest
import yaml
from huggingface_hub import constants

from fedhpc.config.file import load_config
from fedhpc.data.task_files import load_task

WORDS = {"bad": "terrible", "good": "great", "mixed": "okay"}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current folder, in which the files are written."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def backbone(world):
    return world.parent / "backbone"


def write(file, rows):
    """Rows as TSV or JSON lines, by the file's name."""
    lines = map(json.dumps, rows) if file.suffix == ".jsonl" else ["\t".join(row.values()) for row in (rows[0], *rows)]
    text = "\n".join(lines) + "\n"
    if file.suffix == ".tsv":
        text = "\t".join(rows[0]) + text[text.index("\n") :]
    file.write_text(text, encoding="utf-8")
    return file


def rows_of(world, split, **names):
    """The tiny world's examples, with other names for its labels."""
    lines = (world.parent / f"source/{split}.tsv").read_text().splitlines()[1:]
    return [{"text": text, "label": names[label]} for text, label in (line.split("\t") for line in lines)]


@pytest.fixture
def source(world, here):
    """A folder whose labels are words that the tiny model knows."""
    folder = here / "my data"
    folder.mkdir()
    for split in ("train", "dev"):
        write(folder / f"{split}.tsv", rows_of(world, split, **WORDS))
    return folder


def follow(out, fedhpc):
    """Do the two commands that are printed, the run in one process and for one round."""
    prepare, run = (shlex.split(line) for line in out.splitlines()[-2:])
    assert fedhpc(*prepare[1:])[0] == 0
    launch, count, ranks, *run = run
    assert (launch, count, int(ranks) > 1) == ("mpirun", "-np", True)
    status, _, err = fedhpc(*run[1:], "--set", "federation.rounds=1")
    assert status == 0, err


def test_what_is_written_can_be_prepared_and_run(fedhpc, here, source, backbone):
    status, out, err = fedhpc("init", "moods", "--data", source, "--model", backbone)
    assert (status, err) == (0, "")
    assert "moods: 240 train and 48 validation examples" in out
    assert "model: decoder, verbalizer head\n" in out
    labels = [line.split("\t")[1] for line in (source / "train.tsv").read_text().splitlines()[1:]]
    counts = ", ".join(f"{word} {labels.count(word)}" for word in sorted(WORDS.values()))
    assert f"label: label; {counts}\n" in out
    assert f"#   {counts}\n" in (here / "moods.task.yaml").read_text()
    follow(out, fedhpc)
    config = load_config(here / "moods.yaml")
    assert (config.federation.num_devices, config.federation.devices_per_round) == (20, 4)
    records = [json.loads(line) for line in (here / "runs/moods/metrics.jsonl").read_text().splitlines()]
    assert [record["round"] for record in records] == [0]


def test_every_line_of_the_job_file_is_in_place(fedhpc, here, source, backbone):
    assert fedhpc("init", "moods", "--data", source, "--model", backbone)[0] == 0
    text = (here / "moods.slurm").read_text()
    assert "@" not in text.replace("USR1@120", "").replace('"${@:2}"', "")
    assert "#SBATCH --ntasks=5\n" in text
    assert subprocess.run(["bash", "-n", here / "moods.slurm"], check=False).returncode == 0
    assert not any("@" in (here / f"moods{end}").read_text() for end in (".yaml", ".task.yaml"))


def test_every_key_that_is_shown_has_a_comment(fedhpc, here, source, backbone):
    assert fedhpc("init", "moods", "--data", source, "--model", backbone)[0] == 0
    for name in ("moods.yaml", "moods.task.yaml"):
        lines = (here / name).read_text().splitlines()
        for section in yaml.safe_load("\n".join(lines)):
            before = lines[next(index for index, line in enumerate(lines) if line.startswith(f"{section}:")) - 1]
            assert before.startswith("#"), section


def test_labels_that_are_no_words_get_a_linear_head(fedhpc, here, world, backbone):
    """JSON lines, in files of other names; an id, a number, and two columns of text."""
    names = {"bad": 10, "good": 9, "mixed": -1}
    for split, file in (("train", "a.jsonl"), ("dev", "b.jsonl")):
        more = {"id": "x7", "stars": 3, "the title": "It was the place"}
        write(here / file, [{**more, **row} for row in rows_of(world, split, **names)])
    arguments = ("--data", here / "a.jsonl", here / "b.jsonl", "--model", backbone)
    status, out, _ = fedhpc("init", "stars", *arguments)
    assert status == 0
    assert "text: the title, text; " in out
    assert "model: decoder, linear head (the labels are no words)\n" in out
    task = load_task(here / "stars.task.yaml")
    assert task.columns == {"text1": "the title", "text2": "text", "label": "label"}
    assert list(task.classes) == ["-1", "9", "10"]
    follow(out, fedhpc)


def test_csv_can_be_prepared_and_run(fedhpc, source, backbone):
    for split in ("train", "dev"):
        table = source / f"{split}.tsv"
        table.rename(table.with_suffix(".csv")).write_text(table.with_suffix(".csv").read_text().replace("\t", ","))
    status, out, err = fedhpc("init", "moods", "--data", source, "--model", backbone)
    assert (status, err) == (0, "")
    assert "moods: 240 train and 48 validation examples" in out
    follow(out, fedhpc)


def test_words_that_the_model_does_not_know_get_a_linear_head(fedhpc, here, world, backbone):
    status, out, _ = fedhpc("init", "moods", "--data", world.parent / "source", "--model", backbone)
    assert status == 0
    assert "linear head (class word 'bad' does not stand apart" in out
    assert "--head linear" in out


@pytest.mark.parametrize("name", ["yes", "0x1", "a: b #c", "'", '"', "東京", "~", "- a", "{word}", "@NAME@", "\x7f"])
def test_names_that_yaml_could_take_for_something_else_stay_what_they_are(fedhpc, here, backbone, name):
    rows = [{name: "the place was", "label": label} for label in (f"{name} a", "no", "on", "yes")] * 2
    for file in ("train.jsonl", "dev.jsonl"):
        write(here / file, rows)
    status, _, err = fedhpc("init", "2024", "--data", here, "--model", backbone)
    assert status == 0, err
    task = load_task(here / "2024.task.yaml")
    assert (task.name, set(task.columns.values())) == ("2024", {name, "label"})
    assert set(task.classes) == {row["label"] for row in rows}
    assert load_config(here / "2024.yaml").data.task == "2024"


GOOD = [{"text": "the place was", "kind": kind} for kind in "abab"]


@pytest.mark.parametrize(
    ("files", "arguments", "message"),
    [
        ({}, ["--data", "nowhere"], "--data nowhere: there is no such file or folder; give a folder with train.tsv"),
        ({"a.tsv": GOOD}, ["--data", "a.tsv", "--label", "kind"], "--data a.tsv: texts with a label (kind) need a fil"),
        ({"a.tsv": GOOD}, ["--data", "a.tsv", "a.tsv", "a.tsv"], "a.tsv: give a folder with train.tsv and dev.tsv (or"),
        ({"train.pkl": GOOD}, ["--data", "train.pkl"], "train.pkl may hold pickled objects, and reading those can run"),
        ({"a.tsv": GOOD}, ["--data", "."], ". has no train split: looked for train.tsv, train.jsonl"),
        ({"a.xls": GOOD, "b.xls": GOOD}, ["--data", "a.xls", "b.xls"], "a.xls: .xls is not read; give TSV or CSV with"),
        ({}, [], "train.tsv: none is called label, so none is known to be the label's column; name it: --label COLUMN"),
        ({}, ["--label", "mood"], "--label mood: train.tsv has no such column; there are text, kind"),
        ({}, ["--label", "kind", "--text", "kind"], "--text kind: that is the label's column; the others are text"),
        ({}, ["--label", "text"], "column 'text' has 1 different values in 4 examples; expected from 2 to"),
        (
            {"train.tsv": [{"text": "the place", "label": str(number)} for number in range(9)]},
            [],
            "column 'label' has 9 different values in 9 examples",
        ),
        (
            {"train.tsv": [{"label": "a", "class": "b"}, {"label": "b", "class": "a"}]},
            [],
            "train.tsv: label and class may both be the label's column; name it: --label COLUMN, of label, class",
        ),
        (
            {"dev.tsv": [*GOOD, {"text": "the place", "kind": "c"}]},
            ["--label", "kind"],
            "dev.tsv line 6: unknown label 'c'; valid are a, b",
        ),
        (
            {"train.tsv": [{"a": "x", "b": "y", "kind": kind} for kind in "abab"]},
            ["--label", "kind"],
            "train.tsv: none of the columns a, b holds texts; name them: --text COLUMN",
        ),
        ({}, ["--label", "kind", "--model", "nowhere/model"], "model 'nowhere/model' cannot be read"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_message(fedhpc, here, monkeypatch, backbone, files, arguments, message):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # a model's name that is no folder is one of the hub
    data = {"train.tsv": GOOD, "dev.tsv": GOOD} if "--data" not in arguments else {}
    for file, rows in (data | files).items():
        write((here / file), rows)
    data = [] if "--data" in arguments else ["--data", "."]
    model = [] if "--model" in arguments else ["--model", backbone]
    status, out, err = fedhpc("init", "mine", *data, *model, *arguments)
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert not list(here.glob("mine*"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rte", "'rte' is a built-in task (fedhpc prepare --task rte)"),
        ("a/b", "'a/b' is no name for files; give one of letters, digits"),
        ("", "'' is no name for files"),
    ],
)
def test_a_name_that_does_not_do(fedhpc, here, backbone, name, message):
    status, _, err = fedhpc("init", name, "--data", here, "--model", backbone)
    assert status == 2
    assert message in err


@pytest.mark.parametrize("end", [".yaml", ".task.yaml", ".slurm"])
def test_nothing_is_overwritten(fedhpc, here, source, backbone, end):
    (here / f"mine{end}").write_text("precious")
    status, _, err = fedhpc("init", "mine", "--data", source, "--model", backbone)
    assert status == 2
    assert f"mine{end} is there already and is not overwritten" in err
    assert {path.name for path in here.glob("mine*")} == {f"mine{end}"}
    assert (here / f"mine{end}").read_text() == "precious"


def test_long_texts_are_cut_to_what_the_model_takes(fedhpc, here, backbone):
    """It has 64 positions, of which the prompts take 5."""
    rows = [{"text": "the place was " * 30, "label": label} for label in ("great", "terrible") * 2]
    for file in ("train.jsonl", "dev.jsonl"):
        write(here / file, rows)
    status, out, _ = fedhpc("init", "long", "--data", here, "--model", backbone)
    assert status == 0
    assert "4 are shortened to 59" in out
    follow(out, fedhpc)
