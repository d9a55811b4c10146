"""An exported adapter answers in plain transformers and PEFT as `fedhpc predict` does."""

import json
import re

import backbones
import generating
import pytest
import tiny
from test_export import make_trained
from tokenizers import processors
from transformers import AutoTokenizer

from fedhpc.commands import cli
from fedhpc.commands.export.forms import peft_form
from fedhpc.commands.export.readme import EXAMPLE
from fedhpc.errors import ModelError

ASKED = ("dull {prompt} and 'calm'", "plain", "slow and noisy and okay", "the lovely place was bright")
MARKED = generating.CHAT.replace(
    " was {{ message.content }}", " was{% generation %} and {{ message.content }}{% endgeneration %}"
).replace("%} was{% endif", "%} was and{% endif")
"""It asks for an answer with a word more than stands before those that it marks."""
TURNS = {"format": "messages", "template": None}
ORDERS = {"format": "alpaca", "template": None, "columns": {"instruction": "prompt", "input": "mood"}}
ORDERS["columns"]["response"] = "response"
CASES = {
    "prompt": ({}, {}, {}),
    "all of lora": ({}, {"kind": "lora", "rank": 2, "targets": "all-linear", "rslora": True, "dropout": 0.1}, {}),
    "prompt tuning": ({}, {"kind": "prompt_tuning"}, {}),
    "no offset": ({}, {"position_offset": False}, {}),
    "end behind": ({}, {}, {"ends": True}),
    "instructions": (ORDERS, {}, {}),
    "instructions, chat": ({**ORDERS, "chat": True}, {}, {}),
    "turns": ({**TURNS, "system": 'the "place" was'}, {"position_offset": False}, {}),
    "turns, marked": ({**TURNS, "system": "the place"}, {}, {"chat": MARKED}),
    "text": ({"format": "text", "template": None, "columns": {"text": "prompt"}, "metrics": None}, {}, {}),
}


def start(folder, monkeypatch, task, tuning, changes):
    """The run directory of a short run; the tokenizer may have another chat template, or put its end behind a text."""
    write_backbone = generating.write_backbone

    def with_changes(path):
        tokenizer = AutoTokenizer.from_pretrained(write_backbone(path))
        tokenizer.chat_template = changes.get("chat", tokenizer.chat_template)
        if "ends" in changes:
            special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", generating.END)]
            both = processors.TemplateProcessing(single=f"<s> $A {generating.END}", special_tokens=special)
            tokenizer.backend_tokenizer.post_processor = both
        tokenizer.save_pretrained(path)
        return path

    monkeypatch.setattr(generating, "write_backbone", with_changes)
    world = generating.write_world(folder, num_train=48, num_validation=8, **task)
    more = {"selection": {"strategy": "all"}, "evaluate": {"every": 2, "max_new_tokens": 8}}
    tuning = {"head": "language_model", **({} if "rank" in tuning else {"num_tokens": 3}), **tuning}
    config = tiny.write_config(world, folder, "short", tuning=tuning, device__learning_rate=0.2, **more)
    assert cli.main(["run", str(config)]) == 0
    return tiny.run_dir(config)


def answers_of(adapter, monkeypatch, capfd, field=""):
    """What the lines of an adapter's README.md print for each text in place of the example of every field.

    Args:
        field: stays blank.
    """
    monkeypatch.chdir(adapter)
    (snippet,) = re.findall(r"```python\n(.*?)```", (adapter / "README.md").read_text(), flags=re.DOTALL)
    snippet = snippet.replace(f'"{field}": "{EXAMPLE}"', f'"{field}": ""')
    capfd.readouterr()
    for text in ASKED:
        exec(compile(snippet.replace(EXAMPLE, text), "README.md", "exec"), {})
    return capfd.readouterr().out.splitlines()


def predicted(fedhpc, run, *arguments, fields=1):
    texts = [argument for text in ASKED for argument in ("--text", *[text] * fields)]
    status, out, err = fedhpc("predict", run, *texts, *arguments)
    assert status == 0, err
    return [json.loads(line)["answer"] for line in out.splitlines()]


@pytest.mark.parametrize("case", CASES)
def test_the_lines_of_the_readme_give_the_answers_of_predict(tmp_path, monkeypatch, fedhpc, capfd, case):
    run = start(tmp_path, monkeypatch, *CASES[case])
    assert fedhpc("export", run, "--out", tmp_path / "adapter")[0] == 0
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
    fields = 1 + case.startswith("instructions")
    answers = answers_of(tmp_path / "adapter", monkeypatch, capfd)
    assert answers == predicted(fedhpc, run, fields=fields)
    assert len(set(answers)) > 1
    if fields > 1:
        assert answers_of(tmp_path / "adapter", monkeypatch, capfd, "input") == predicted(fedhpc, run)


def test_a_device_answers_with_its_own_layers(tmp_path, monkeypatch, fedhpc, capfd):
    world = generating.write_world(tmp_path, num_train=48, num_validation=8)
    config = tiny.write_config(world, tmp_path, "far", device__learning_rate=1.0)
    assert cli.main(["run", str(config)]) == 0
    run, answers = tiny.run_dir(config), []
    for device in range(6):
        adapter = tmp_path / f"adapter{device}"
        status, _, err = fedhpc("export", run, "--device", device, "--out", adapter)
        if status:
            assert "has not been trained" in err
            continue
        answers.append(answers_of(adapter, monkeypatch, capfd))
        assert answers[-1] == predicted(fedhpc, run, "--device", device)
    assert any(own != answers[0] for own in answers)


def test_a_window_shorter_than_texts_with_their_answers_is_refused(tmp_path):
    path = backbones.save_backbone(tmp_path, "mistral", sliding_window=60)
    description = backbones.describe("mistral", words=[], head="language_model")
    with pytest.raises(ModelError, match="window of 60 positions, but texts and prompts have up to 80"):
        peft_form(make_trained(path, description))
