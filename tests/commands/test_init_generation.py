"""fedhpc init for texts to be generated: what it writes can be run and answers, and what is wrong is said."""

import json
import shlex

import generating
import pytest
import tiny
import yaml

from fedhpc.config.file import load_config
from fedhpc.data.task_files import load_task


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current folder, in which the files are written."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def models(world, tmp_path_factory):
    """Decoders with a chat template and without, and an encoder."""
    folder = tmp_path_factory.mktemp("models")
    return {
        "chat": generating.write_backbone(folder / "chat"),
        "plain": world.parent / "backbone",
        "encoder": tiny.write_backbone(folder / "encoder", kind="encoder"),
    }


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def pairs(count=40, **names):
    """Prompts and responses of the tiny model's words, and a conversation of each, in columns of these names."""
    for number, record in enumerate(generating.records("train", count)):
        row = {name: record[key] for name, key in names.items()}
        yield {**row, "id": f"x{number}"}


def sharegpt(messages):
    """The same conversation in the other form."""
    names = {"user": "human", "assistant": "gpt"}
    return [{"from": names[message["role"]], "value": message["content"]} for message in messages]


def follow(out, fedhpc, texts=("the place was",)):
    """Do the three commands that are printed, the run in one process and for one round; the answer."""
    prepare, run, predict = (shlex.split(line) for line in out.splitlines()[-3:])
    status, _, err = fedhpc(*prepare[1:])
    assert status == 0, err
    launch, count, ranks, *run = run
    assert (launch, count, int(ranks) > 1) == ("mpirun", "-np", True)
    status, _, err = fedhpc(*run[1:], "--set", "federation.rounds=1")
    assert status == 0, err
    assert predict[-len(texts) - 1 :] == ["--text", *["..."] * len(texts)]
    status, answer, err = fedhpc(*predict[1 : -len(texts)], *texts)
    assert status == 0, err
    return json.loads(answer)["answer"]


PROMPT, OUTPUT = {"prompt": "prompt", "response": "response"}, {"instruction": "prompt", "output": "response"}
FORMATS = {
    "messages": ("chat", {"messages": "messages"}, [], {"format": "messages", "columns": {"messages": "messages"}}),
    "messages of another name": (
        "chat",
        {"talk": "messages", "mood": "mood"},
        [],
        {"format": "messages", "columns": {"messages": "talk"}},
    ),
    "one of two": (
        "chat",
        {"good": "messages", "bad": "messages"},
        ["--response", "good"],
        {"format": "messages", "columns": {"messages": "good"}},
    ),
    "pairs for a chat model": ("chat", PROMPT, [], {"columns": {key: key for key in PROMPT}, "chat": True}),
    "pairs": ("plain", PROMPT, [], {"columns": {key: key for key in PROMPT}, "template": "{prompt}\n"}),
    "alpaca": (
        "plain",
        OUTPUT,
        [],
        {"format": "alpaca", "columns": {"instruction": "instruction", "response": "output"}},
    ),
    "alpaca for a chat model": (
        "chat",
        {**OUTPUT, "label": "mood"},
        ["--response", "output"],
        {"format": "alpaca", "columns": {"instruction": "instruction", "response": "output"}, "chat": True},
    ),
    "named": (
        "plain",
        {"question": "prompt", "answer": "response"},
        ["--response", "answer", "--text", "question"],
        {"columns": {"prompt": "question", "response": "answer"}, "template": "{prompt}\n"},
    ),
    "named, with two fields": (
        "chat",
        {"about": "prompt", "question": "prompt", "answer": "response"},
        ["--response", "answer", "--text", "about", "question"],
        {
            "columns": {"about": "about", "question": "question", "response": "answer"},
            "template": "{about}\n{question}",
            "chat": True,
        },
    ),
    "text": ("plain", {"text": "prompt"}, [], {"format": "text", "columns": {"text": "text"}, "metrics": ()}),
    "text beside a label": (
        "chat",
        {"story": "prompt", "mood": "mood"},
        ["--response", "story"],
        {"format": "text", "columns": {"text": "story"}, "metrics": ()},
    ),
}


@pytest.mark.parametrize("case", FORMATS)
def test_what_is_written_answers(fedhpc, here, models, case):
    model, names, options, expected = FORMATS[case]
    rows = list(pairs(**names))
    write(here / "all.jsonl", rows)
    status, out, err = fedhpc("init", "mine", "--data", "all.jsonl", "--model", models[model], *options)
    assert (status, err) == (0, "")
    assert out.startswith("mine: 38 train and 2 validation examples in . (all.jsonl; 5% held back to validate)\n")
    task = load_task(here / "mine.task.yaml")
    usual = {"format": "prompt-response", "template": None, "chat": False, "metrics": ("token_f1",), "device": None}
    assert {key: getattr(task, key) for key in ("columns", *usual)} == usual | expected
    assert (task.splits, task.held_back) == ({"train": ("all.jsonl",)}, 0.05)
    assert isinstance(follow(out, fedhpc, ["the place was"] * len(options[3:] or ["one"])), str)
    answers = list((here / "runs/mine/generations").glob("*"))
    assert bool(answers) == (task.format != "text")


def test_alpaca_with_an_input(fedhpc, here, models):
    write(here / "all.jsonl", pairs(instruction="prompt", input="mood", output="response"))
    status, out, _ = fedhpc("init", "mine", "--data", "all.jsonl", "--model", models["chat"])
    assert status == 0
    assert "texts to be generated: alpaca (instruction, input, output), put by the tokenizer's chat template\n" in out
    assert follow(out, fedhpc, ["place", "was"]) is not None


def test_conversations_of_sharegpt(fedhpc, here, models):
    """In a folder with a file for each split, beside a prompt that is no column of its own format."""
    for split in ("train", "dev"):
        rows = pairs(prompt="prompt", conversations="messages")
        write(here / f"{split}.jsonl", ({**row, "conversations": sharegpt(row["conversations"])} for row in rows))
    status, out, _ = fedhpc("init", "mine", "--data", here, "--model", models["chat"])
    assert status == 0
    assert f"mine: 40 train and 40 validation examples in {here} (train.jsonl, dev.jsonl)\n" in out
    task = load_task(here / "mine.task.yaml")
    assert (task.format, task.columns, task.held_back) == ("messages", {"messages": "conversations"}, None)
    assert follow(out, fedhpc) is not None


@pytest.mark.parametrize("model", ["plain", "chat"])
def test_every_key_that_is_shown_has_a_comment(fedhpc, here, models, model):
    rows = [{**row, "user": number % 4} for number, row in enumerate(pairs(**PROMPT))]
    write(here / "train.jsonl", rows)
    assert fedhpc("init", "mine", "--data", here, "--model", models[model])[0] == 0
    for name in ("mine.yaml", "mine.task.yaml"):
        lines = (here / name).read_text().splitlines()
        assert not any("@" in line for line in lines)
        for section in yaml.safe_load("\n".join(lines)):
            before = lines[next(index for index, line in enumerate(lines) if line.startswith(f"{section}:")) - 1]
            assert before.startswith("#"), section


@pytest.mark.parametrize(
    ("columns", "devices", "said"),
    [
        ({"User_ID": lambda number: number % 5}, 5, "5, values of User_ID with 4 examples or more"),
        ({"user": lambda number: number % 5, "site": lambda number: number % 4 > 0}, None, "(5 values), site (2"),
        ({"topic": lambda number: f"t{number % 3}"}, None, "could name them: topic (3 values)"),
        ({"'a\nb'": lambda number: number % 3}, None, "could name them: \"'a\\nb'\" (3 values)"),
        ({"user": lambda number: "all"}, None, "4 alike\n"),
        ({"user": lambda number: number % 20}, None, "4 alike\n"),
        ({"user": lambda number: number % 4 / 2}, None, "4 alike\n"),
        ({"user": lambda number: number % 4 or None}, None, "4 alike\n"),
    ],
)  # fmt: skip
def test_who_the_devices_are(fedhpc, here, models, columns, devices, said):
    """Somebody's name or number that repeats is a device; other columns are named, and are none."""
    rows = [
        {**row, **{name: of(number) for name, of in columns.items()}} for number, row in enumerate(pairs(46, **PROMPT))
    ]
    write(here / "all.jsonl", rows)
    status, out, _ = fedhpc("init", "mine", "--data", "all.jsonl", "--model", models["plain"])
    assert status == 0
    assert said in out
    federation, task = load_config(here / "mine.yaml").federation, load_task(here / "mine.task.yaml")
    assert federation.devices_per_round == 4
    if devices:
        assert (federation.partition, federation.num_devices) == ("column", devices)
        assert task.device == "User_ID"
        follow(out, fedhpc)
    else:
        assert (federation.partition, federation.num_devices, task.device) == ("iid", 4, None)
        proposed = (here / "mine.task.yaml").read_text().count("\n# device: ")
        assert proposed == len(columns) * ("(" in said)


def test_devices_that_the_validation_examples_do_not_have(fedhpc, here, models):
    for split in ("train", "dev"):
        write(here / f"{split}.jsonl", ({**row, "user": f"{split}{n % 4}"} for n, row in enumerate(pairs(**PROMPT))))
    status, out, _ = fedhpc("init", "mine", "--data", here, "--model", models["plain"])
    assert status == 0
    assert load_config(here / "mine.yaml").federation.partition == "iid"
    follow(out, fedhpc)


def test_prompts_leave_room_for_an_answer(fedhpc, here, models):
    """The model has 64 positions."""
    rows = [{"prompt": "the place was " * length, "response": "great " * 20} for length in (1, 2, 30, 30)]
    write(here / "all.jsonl", rows * 3)
    status, out, _ = fedhpc("init", "mine", "--data", "all.jsonl", "--model", models["plain"])
    assert status == 0
    assert "are shortened to 32\n" in out
    assert load_config(here / "mine.yaml").evaluate.max_new_tokens == 32
    follow(out, fedhpc)


def turns(*roles):
    return [{"role": role, "content": "the place"} for role in roles]


GOOD = [{"prompt": "the place", "response": "was great"}] * 3
LABELLED = [{**row, "label": label} for row, label in zip(GOOD, "abc", strict=True)]
TALKS = [{"messages": turns("user", "assistant")}] * 3


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (GOOD, ["--model", "encoder"], "/encoder' is an encoder, which generates no text; task mine needs a decoder"),
        (TALKS, ["--model", "plain"], "task mine needs a chat template, and the tokenizer has none: use the family's"),
        ([*GOOD, {"prompt": "it", "response": " "}], [], "all.jsonl line 4: column 'response' holds no text"),
        ([*GOOD, {"prompt": "it"}], [], "all.jsonl line 4: column 'response' holds None, expected text"),
        ([*TALKS, {"messages": turns("user", "user")}], [], "all.jsonl line 4: column 'messages', message 2: user spe"),
        ([{"messages": "hi"}, *TALKS], [], "all.jsonl line 1: column 'messages' holds a str, expected messages"),
        ([{"messages": []}], [], "all.jsonl line 1: column 'messages' holds an empty list, expected messages"),
        (GOOD[:1], [], "all.jsonl line 1 is the only example; two splits need two"),
        (
            LABELLED,
            [],
            "all.jsonl: response may be the column to be generated: name it, --response COLUMN, or label the label's: "
            "--label COLUMN; there are prompt, response, label",
        ),
        (LABELLED, ["--response", "answer"], "--response answer: all.jsonl has no such column; there are prompt, resp"),
        (LABELLED, ["--response", "response", "--text", "response"], "--text response: that is the response's column"),
        (TALKS, ["--response", "messages", "--text", "messages"], "--text messages: that is the response's column"),
        (
            [{**row, "chosen": row["messages"]} for row in [{"good": "it", **row} for row in TALKS]],
            ["--response", "chosen", "--text", "good"],
            "--text good: chosen holds conversations, before which no text can stand",
        ),
        (
            [{"chosen": row["messages"], "rejected": row["messages"]} for row in TALKS],
            [],
            "all.jsonl: chosen or rejected may be the column to be generated: name it, --response COLUMN; there are",
        ),
        (
            [{"question": "the place", "answer": "it was"}],
            [],
            "all.jsonl: none is called label, so none is known to be the label's column; name it: --label COLUMN, or "
            "that of texts to be generated: --response COLUMN, of question, answer",
        ),
        (
            [{"about": "the place", "question": f"it was {n}", "answer": "it was"} for n in range(3)],
            ["--response", "answer"],
            "all.jsonl: about and question may stand before answer; name those that do, in their order: --text COLUMN",
        ),
        ([{"text": "the place", "kind": kind} for kind in "abab"], [], "none is called label, so none is known to be"),
        (
            [{"instruction": "the place", "response": "it was", "category": kind} for kind in "abab"],
            [],
            "--data all.jsonl: texts with a label (category) need a file to validate on as well; give a folder with "
            "train.tsv and dev.tsv (or .csv, .jsonl, .parquet), or two such files of one folder; of texts to be "
            "generated name the column: --response COLUMN",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_message(fedhpc, here, models, rows, options, message):
    write(here / "all.jsonl", rows)
    model = models[options[1] if "--model" in options else "chat"]
    options = [] if "--model" in options else options
    status, out, err = fedhpc("init", "mine", "--data", "all.jsonl", "--model", model, *options)
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert not list(here.glob("mine*"))
