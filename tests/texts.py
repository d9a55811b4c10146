"""Texts to be generated, of a few authors and moods, prepared for a tiny model."""

import json

import tiny
import yaml

from fedhpc.commands import cli
from fedhpc.seeding import generator

AUTHORS = {"ann": 9, "bob": 40, "cid": 25, "dot": 60, "eve": 2}
"""Training examples of each."""
TASK = {
    "task": "replies",
    "kind": "generation",
    "device": "author",
    "category": "mood",
    "splits": {"train": "train.jsonl", "validation": "dev.jsonl"},
}


def write_texts(folder, **task):
    """Records whose words give their mood away; one author has validation examples only."""
    folder.mkdir()
    for split, authors in (("train", AUTHORS), ("dev", dict.fromkeys([*AUTHORS, "fay"], 4))):
        rng = generator(0, purpose=split)
        records = []
        for author, count in authors.items():
            for _ in range(count):
                mood = str(rng.choice(list(tiny.WORDS)))
                prompt = f"the place was {' and '.join(rng.choice(tiny.WORDS[mood], 4, replace=False))}"
                answer = tiny.TASK["classes"][mood]
                records.append({"prompt": prompt, "response": answer, "author": author, "mood": mood, "one": "same"})
        records = [records[place] for place in rng.permutation(len(records))]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    task = {key: value for key, value in {**TASK, **task}.items() if value is not None}
    (folder / "task.yaml").write_text(yaml.safe_dump(task))
    return folder


def prepare_texts(folder, backbone, **task):
    """The folder of the prepared data."""
    source = write_texts(folder / "source", **task)
    arguments = ["--task", source / "task.yaml", "--source", source, "--model", backbone, "--out", folder / "prepared"]
    assert cli.main(["prepare", *map(str, arguments)]) == 0
    return folder / "prepared"
