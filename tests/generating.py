"""A whole run's inputs for texts to be generated, as `tiny` has them for classes."""

import json

import tiny
import yaml
from transformers import AutoTokenizer

from fedhpc.commands import cli
from fedhpc.seeding import generator

TASK = {
    "task": "moods-chat",
    "kind": "generation",
    "template": "the place was {prompt} . It was",
    "category": "mood",
    "metrics": ["exact_match", "token_f1"],
    "splits": {"train": "train.jsonl", "validation": "dev.jsonl"},
}
CHAT = (
    "{% for message in messages %}{% if message.role == 'user' %}the {{ message.content }} It"
    "{% else %} was {{ message.content }} <mask>\n{% endif %}{% endfor %}{% if add_generation_prompt %} was{% endif %}"
)
"""Assistants' turns begin with words that are given, and end with a special token that is not the tokenizer's end."""
END = "."


def write_backbone(folder):
    """A tiny LLaMA whose tokenizer has an end token and a chat template."""
    tiny.write_backbone(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token, tokenizer.chat_template = END, CHAT
    tokenizer.save_pretrained(folder)
    return folder


def records(split, count):
    """Prompts whose words give the answer away; every prompt of the validation split has two references."""
    rng = generator(0, purpose=split)
    for _ in range(count):
        mood = str(rng.choice(list(tiny.WORDS)))
        prompt = " and ".join(rng.choice(tiny.WORDS[mood], rng.integers(1, 5)))
        for answer in (tiny.TASK["classes"][mood], "fine") if split == "dev" else (tiny.TASK["classes"][mood],):
            turns = [("user", "place"), ("assistant", answer), ("user", prompt), ("assistant", f"{answer} place")]
            messages = [{"role": role, "content": content} for role, content in turns]
            yield {"prompt": prompt, "response": answer, "mood": mood, "messages": messages}


def write_world(folder, *, num_train=120, num_validation=20, **task):
    """Everything a run needs; the run's configuration file."""
    backbone = write_backbone(folder / "backbone")
    source = folder / "source"
    source.mkdir()
    for split, count in (("train", num_train), ("dev", num_validation)):
        lines = [json.dumps(record) for record in records(split, count)]
        (source / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    task = {key: value for key, value in {**TASK, **task}.items() if value is not None}
    (source / "task.yaml").write_text(yaml.safe_dump(task))
    arguments = ["--task", source / "task.yaml", "--source", source, "--model", backbone, "--out", folder / "prepared"]
    assert cli.main(["prepare", *map(str, arguments)]) == 0
    config = {
        "run_dir": str(folder / "run"),
        "model": {"name": str(backbone), "dtype": "float32"},
        "data": {"path": str(folder / "prepared")},
        "federation": {"num_devices": 6, "sample_rate": 0.5, "rounds": 2, "partition": "iid"},
        "tuning": {"num_tokens": 3, "head": "language_model"},
        "selection": {"strategy": "random", "ratio": 0.5},
        "device": {"epochs": 1, "batch_size": 8, "learning_rate": 0.05},
        "evaluate": {"every": 1, "generate": 7, "max_new_tokens": 5, "batch_size": 4},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path
