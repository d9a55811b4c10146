"""`fedhpc predict` answers as evaluation did, to prompts that are put and tokenised as in training."""

import json

import generating
import pytest
import tiny
from tiny import run_dir

from fedhpc.api import RunResult
from fedhpc.commands import cli
from fedhpc.commands.answering import Answerer, Asker
from fedhpc.commands.trained import load_trained
from fedhpc.config.file import load_config
from fedhpc.data.generation import GenerationTask
from fedhpc.data.prepared import PreparedData
from fedhpc.errors import EXIT_USER_ERROR, ConfigError, DataError
from fedhpc.evaluate.questions import prompt_of
from fedhpc.job.console import Lasting


def start(folder, **task):
    """A run that ended; its configuration file."""
    config = generating.write_world(folder, num_validation=8, **task)
    assert cli.main(["run", str(config)]) == 0
    return config


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run on prompts; not to be changed."""
    return start(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """A run on conversations; not to be changed."""
    return start(tmp_path_factory.mktemp("chat"), format="messages", template=None)


def source(config):
    return [json.loads(line) for line in (config.parent / "source/dev.jsonl").read_text().splitlines()]


def last_answers(config):
    content = (run_dir(config) / "generations/round_000001.jsonl").read_text()
    return {line["example"]: line for line in map(json.loads, content.splitlines())}


@pytest.mark.parametrize("world", ["plain", "chat"])
def test_answers_are_those_of_the_last_evaluation(request, fedhpc, world):
    config = request.getfixturevalue(world)
    status, out, err = fedhpc("predict", run_dir(config), "--file", config.parent / "source/dev.jsonl")
    if world == "chat":  # whose last turn is the assistant's
        assert status == EXIT_USER_ERROR
        assert "dev.jsonl line 1: the user does not speak last" in err
        asked = config.parent / "asked.jsonl"
        lines = [json.dumps({"messages": record["messages"][:-1]}) for record in source(config)]
        asked.write_text("\n".join(lines) + "\n")
        status, out, err = fedhpc("predict", run_dir(config), "--file", asked)
    assert status == 0, err
    found = [json.loads(line) for line in out.splitlines()]
    expected = last_answers(config)
    assert len(found) == len(source(config))
    assert {example: found[example]["answer"] for example in expected} == {
        example: line["answer"] for example, line in expected.items()
    }
    assert set(found[0]) == {"text" if world == "plain" else "messages", "answer"}


def test_a_device_answers_with_its_own_layers(plain, fedhpc):
    lines = [line for line in last_answers(plain).values() if line["answer"] != line["answer_personal"]]
    assert lines
    for line in lines:
        text = source(plain)[line["example"]]["prompt"]
        _, out, _ = fedhpc("predict", run_dir(plain), "--text", text, "--device", line["device"])
        assert json.loads(out)["answer"] == line["answer_personal"]


@pytest.mark.parametrize("world", ["plain", "chat"])
def test_prompts_are_tokenised_as_in_training(request, world):
    config = request.getfixturevalue(world)
    answerer = Answerer(load_trained(str(run_dir(config))), {})
    records = source(config)
    asked = [
        answerer.asker.conversation(record["messages"][:-1], "here")
        if world == "chat"
        else answerer.asker.text([record["prompt"]], "here")
        for record in records
    ]
    prompts = answerer.prompts(asked)
    split = PreparedData.open(load_config(config).data.path, verify=False).split("validation")
    for example in range(len(records)):
        ours = prompts.tokens[prompts.offsets[example] : prompts.offsets[example + 1]]
        assert ours.tolist() == prompt_of(split, example).tolist()
        assert prompts.spans_of(example).tolist() == split.spans_of(example)[:-1].tolist()
    assert set(answerer.decoding.ends) == {
        answerer.tokenizer.eos_token_id,
        *([answerer.tokenizer.mask_token_id] if world == "chat" else []),
    }


def test_a_conversation_may_be_a_message_a_file_or_a_list(chat, fedhpc, tmp_path):
    turns = [{"role": "user", "content": "dull and slow"}]
    (tmp_path / "one.json").write_text(json.dumps(turns, indent=1))
    result = RunResult(run_dir(chat))
    by_file, by_text = (
        json.loads(fedhpc("predict", run_dir(chat), *arguments)[1])
        for arguments in (("--file", tmp_path / "one.json"), ("--text", "dull and slow"))
    )
    assert by_file == {"messages": turns, "answer": by_text["answer"]}
    assert by_text["text"] == "dull and slow"
    assert result.predict([turns]) == [by_file]
    assert result.predict(["dull and slow"]) == [by_text]
    assert result.predict(text for text in ["dull and slow"]) == [by_text]


def test_options_have_their_way(plain, fedhpc):
    result = RunResult(run_dir(plain))
    (usual,), (short,) = result.predict(["dull"], temperature=0.0), result.predict(["dull"], max_new_tokens=1)
    assert usual["answer"].split()[:1] == short["answer"].split()
    assert len(short["answer"].split()) <= 1
    warm = ["--temperature", "2.5", "--top-p", "0.95", "--max-new-tokens", "12"]
    first, second = (fedhpc("predict", run_dir(plain), "--text", "dull", *warm)[1] for _ in range(2))
    assert first == second
    assert json.loads(first)["answer"] != usual["answer"]


def test_a_terminal_gets_the_answers_as_they_come(plain, fedhpc, monkeypatch):
    texts = ["--text", "dull", "--text", "calm"]
    answers = [json.loads(line)["answer"] for line in fedhpc("predict", run_dir(plain), *texts)[1].splitlines()]
    monkeypatch.setattr(Lasting, "isatty", lambda stream: True)
    assert fedhpc("predict", run_dir(plain), *texts)[1] == "".join(f"{answer}\n" for answer in answers)


def test_what_cannot_be_asked_is_refused(plain, chat, fedhpc, tmp_path):
    def refusal(*arguments):
        status, out, err = fedhpc("predict", *arguments)
        assert status == EXIT_USER_ERROR
        assert out == ""
        return err

    assert "--text 1: 2 texts given, this task takes 1: prompt" in refusal(run_dir(plain), "--text", "a", "b")
    assert "--text 1: holds no text" in refusal(run_dir(plain), "--text", " ")
    assert "--all-classes: this run generates text" in refusal(run_dir(plain), "--text", "a", "--all-classes")
    for wrong, words in (
        (["--temperature", "-1"], "evaluate.temperature: should be greater than or equal to 0, found -1.0"),
        (["--top-p", "0.5"], "predict: evaluate.top_p below 1 needs evaluate.temperature above 0"),
    ):
        assert words in refusal(run_dir(plain), "--text", "a", *wrong)
    assert "has 64 positions" in refusal(run_dir(plain), "--text", "dull", "--max-new-tokens", "60")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "dull"}\n{"text": "dull"}\n')
    assert "rows.jsonl line 2: no column 'prompt'" in refusal(run_dir(plain), "--file", rows)
    (tmp_path / "none.tsv").write_text("prompt\n")
    assert "none.tsv: holds no text" in refusal(run_dir(plain), "--file", tmp_path / "none.tsv")
    talk = tmp_path / "talk.jsonl"
    talk.write_text('{"messages": [{"role": "user"}]}\n')
    assert "talk.jsonl line 1: column 'messages" in refusal(run_dir(chat), "--file", talk)
    for content, words in (("[{", "no list of messages in JSON"), ('[{"role": "assistant"}]', "does not speak last")):
        (tmp_path / "list.json").write_text(content)
        assert words in refusal(run_dir(chat), "--file", tmp_path / "list.json")
    with pytest.raises(DataError, match="text 1: a conversation, but"):
        RunResult(run_dir(plain)).predict([[{"role": "user", "content": "dull"}]])


def test_options_of_answers_are_refused_for_classes(world, tmp_path):
    config = tiny.write_config(world, tmp_path, "run", federation__rounds=1)
    assert cli.main(["run", str(config)]) == 0
    with pytest.raises(ConfigError, match="temperature: this run classifies"):
        RunResult(run_dir(config)).predict(["the place was dull"], temperature=1.0)


def test_an_instruction_needs_no_input():
    asker = Asker(GenerationTask(name="orders", format="alpaca", columns={"input": "context"}, splits={}))
    assert asker.text(["sum up"], "here").record == {"instruction": "sum up"}
    both = asker.text(["sum up", "the place was dull"], "here")
    assert both.record == {"instruction": "sum up", "context": "the place was dull"}
    assert both.shown == {"text": {"instruction": "sum up", "input": "the place was dull"}}
    with pytest.raises(DataError, match="here: 3 texts given, this task takes 2: instruction, input"):
        asker.text(["a", "b", "c"], "here")
