"""A whole run's inputs, small enough to train in a second: backbone, prepared data, configuration."""

import importlib.util
import json
import sys
from pathlib import Path

import h5py
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedhpc.checkpoint.files import SERVER_FILE
from fedhpc.checkpoint.store import Checkpoints
from fedhpc.seeding import generator

ROOT = Path(__file__).parent.parent
NUM_LAYERS, NUM_TOKENS, KEY_WIDTH, NUM_DEVICES = 4, 3, 16, 12
TASK = {
    "task": "moods",
    "columns": {"a": "text", "label": "label"},
    "classes": {"bad": "terrible", "good": "great", "mixed": "okay"},
    "template": {"encoder": "{a} It was <mask> .", "decoder": "{a} It was {word} ."},
    "splits": {"train": "train.tsv", "validation": "dev.tsv"},
}
GENERATION_TASK = {
    "task": "answers",
    "kind": "generation",
    "columns": {"prompt": "text", "response": "answer"},
    "template": "{prompt} It was ",
    "device": "label",
    "category": "label",
    "splits": {"train": "train-answers.tsv", "validation": "dev-answers.tsv"},
}
WORDS = {
    "bad": ["dull", "slow", "noisy", "broken"],
    "good": ["bright", "quick", "calm", "lovely"],
    "mixed": ["plain", "usual", "average", "fine"],
}


def load_script(name):
    """A script of data_prep as a module."""
    spec = importlib.util.spec_from_file_location(f"data_prep_{name}", ROOT / "data_prep" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def word_tokenizer():
    """Whole words behind a start token."""
    common = ["<s>", "<pad>", "<unk>", "<mask>", "the", "place", "was", "and", "It", ".", "terrible", "great", "okay"]
    words = [*common, *WORDS["bad"], *WORDS["good"], *WORDS["mixed"]]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    special = {"bos_token": "<s>", "pad_token": "<pad>", "unk_token": "<unk>", "mask_token": "<mask>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def write_backbone(folder, seed=0, kind="decoder", num_layers=NUM_LAYERS):
    """A LLaMA with grouped-query attention, or a BERT, with random weights."""
    tokenizer = word_tokenizer()
    common = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": 0.2,
    }
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **common))
    if kind == "encoder":
        model = BertForMaskedLM(BertConfig(**common))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_source(folder, num_train=240, num_validation=48):
    """Sentences whose words give the class away; in files of their own the same with an answer to each."""
    folder.mkdir()
    for split, count in (("train", num_train), ("dev", num_validation)):
        rng = generator(0, purpose=split)
        lines, answers = ["text\tlabel"], ["text\tlabel\tanswer"]
        for _ in range(count):
            label = str(rng.choice(list(WORDS)))
            said = " and ".join(rng.choice(WORDS[label], rng.integers(1, 5)))
            lines.append(f"the place was {said}\t{label}")
            answers.append(f"{lines[-1]}\t{TASK['classes'][label]} and {said.split()[0]} .")
        (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n")
        (folder / f"{split}-answers.tsv").write_text("\n".join(answers) + "\n")
    (folder / "task.yaml").write_text(yaml.safe_dump(TASK))
    (folder / "generation.yaml").write_text(yaml.safe_dump(GENERATION_TASK))
    return folder


def write_config(world, folder, run, **changes):
    """A world's configuration as RUN.yaml in a folder, with a run directory there and changes by dotted key."""
    config = yaml.safe_load(world.read_text())
    config["run_dir"] = str(folder / run)
    for key, value in changes.items():
        section, _, leaf = key.rpartition("__")
        (config.setdefault(section, {}) if section else config)[leaf] = value
    path = folder / f"{run}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def write_world(folder, kind="decoder", num_layers=NUM_LAYERS, task="task", head=None, **source):
    """Everything a run needs; the run's configuration file.

    Args:
        task: which of the source's task files, `task` or `generation`.
        head: unless it is what `fedhpc prepare` takes of itself.
    """
    backbone = write_backbone(folder / "backbone", kind=kind, num_layers=num_layers)
    source = write_source(folder / "source", **source)
    arguments = [
        "--task",
        source / f"{task}.yaml",
        "--source",
        source,
        "--model",
        backbone,
        "--out",
        folder / "prepared",
        *(("--head", head) if head else ()),
    ]
    assert load_script("prepare").main([str(argument) for argument in arguments]) == 0
    config = {
        "run_dir": str(folder / "run"),
        "model": {"name": str(backbone)},
        "data": {"path": str(folder / "prepared")},
        "federation": {"num_devices": NUM_DEVICES, "sample_rate": 0.5, "rounds": 3},
        "tuning": {"num_tokens": NUM_TOKENS, "head": head or ("verbalizer" if task == "task" else "language_model")},
        "selection": {"strategy": "score", "ratio": 0.5},
        "device": {"epochs": 1, "batch_size": 8, "learning_rate": 0.05},
        "evaluate": {"every": 1},
        "trace": True,
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def run_dir(config):
    """The run directory that a configuration file names."""
    return Path(yaml.safe_load(config.read_text())["run_dir"])


def metrics(config):
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run_dir(config) / "metrics.jsonl").read_text().splitlines()]


def arrays(path):
    """Every dataset of an HDF5 file, as bytes."""
    found = {}
    with h5py.File(path) as file:
        file.visititems(
            lambda name, item: found.update({name: item[()].tobytes()}) if isinstance(item, h5py.Dataset) else None
        )
    return found


def server_file(config):
    """That of a run's newest checkpoint."""
    checkpoints = Checkpoints(run_dir(config))
    return checkpoints.path(checkpoints.positions()[0]) / SERVER_FILE


def final_tensors(config):
    """Every dataset of a run's newest checkpoint, as bytes."""
    found = arrays(server_file(config))
    found.pop("history/record")  # it has seconds in it
    return found


def final_prompts(config):
    """The bytes of the prompts in a run's newest checkpoint."""
    with h5py.File(server_file(config)) as file:
        return file["prompts"][()].tobytes()


def traces(config):
    """Every dataset of a run's traces, as bytes, by file name."""
    return {path.name: arrays(path) for path in sorted((run_dir(config) / "traces").iterdir())}
