"""A real decoder on real texts: training with fedhpc, one device at a time and four side by side, and with PEFT.

    python benchmarks/real_decoder.py MODEL PREPARED... [--texts FILE.jsonl] [--json FILE]

MODEL: a folder with a pretrained decoder, as SmolLM2-135M. PREPARED: folders that `fedhpc prepare` wrote for it.
FILE.jsonl: texts in a column `prompt`, whose lengths count alone. Four devices have 16 texts each, in batches of 8;
each trains one epoch, with deep prompts of 20 tokens and with LoRA, to answer with class words. The other side is
PEFT in a plain loop, batches drawn at random and padded to their longest text: to answer with class words, by the
logits that the language model puts out; and as a sequence classifier, which computes none. One CPU thread; all take
turns in one process, each turn with other batches; compiled kernels are kept as in a run. Figures are texts a second,
medians over the turns, and how many tokens were computed for each token of the texts. `prepacked` is with
`model.prepack_weights`.

Then an evaluation of 400 texts, 10 on each of 40 devices: personalised, every device's by prompts of its own, and
global, all by the same, in batches of 32. It takes turns with the same on padded batches, one device at a time, and
with one of 80 texts.
"""

import argparse
import json
import os
import statistics
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PrefixTuningConfig, TaskType, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.utils import logging

from fedhpc.checkpoint.device_state import DeviceState
from fedhpc.commands.role import KERNELS_KEPT
from fedhpc.config import Config, section_of
from fedhpc.config.sections import ModelConfig
from fedhpc.data.prepared import PreparedData, Split
from fedhpc.device.local_update import Assignment, local_updates
from fedhpc.evaluate.predictions import class_scores, device_batches, evaluation_batches
from fedhpc.model.backbone import Backbone
from fedhpc.model.pretrained import load_tokenizer, read_shape
from fedhpc.registry import TUNINGS
from fedhpc.tuning import make_tuning
from fedhpc.tuning.base import as_parameters

NUM_TOKENS, RANK, BATCH, DEVICES, TEXTS, LONGEST = 20, 8, 8, 4, 16, 512
EVALUATED, EVALUATING, EVALUATION_BATCH = 400, 40, 32
KINDS = {
    "deep prompts": (
        {"kind": "prompt", "num_tokens": NUM_TOKENS},
        partial(PrefixTuningConfig, num_virtual_tokens=NUM_TOKENS),
    ),
    "LoRA": (
        {"kind": "lora", "rank": RANK, "alpha": 2.0 * RANK},
        partial(LoraConfig, r=RANK, lora_alpha=2 * RANK, target_modules=["q_proj", "v_proj"]),
    ),
}


def some_texts(split, rng):
    """DEVICES * TEXTS examples of a split, as a split of their own."""
    chosen = rng.choice(len(split), DEVICES * TEXTS, replace=False)
    tokens = [split.tokens[split.offsets[i] : split.offsets[i + 1]] for i in chosen]
    examples = [(ids, len(ids) - 1) for ids in tokens]
    return Split.of(examples, split.labels[chosen], pad_id=split.pad_id)


def texts_of(file, model, rng):
    """As many texts of a file, of LONGEST tokens at most, with classes at random."""
    prompts = [json.loads(line)["prompt"] for line in file.read_text().splitlines()]
    tokenizer = load_tokenizer(model)
    chosen = rng.choice(len(prompts), DEVICES * TEXTS, replace=False)
    ids = [tokenizer(prompts[i])["input_ids"][:LONGEST] for i in chosen]
    return Split.of([(each, len(each) - 1) for each in ids], rng.integers(0, 2, len(ids)), pad_id=0)


def ours(model, description, split, tuning_config, dtype, *, prepack):
    """Functions that train all devices one by one, and side by side."""
    config = Config.model_validate(
        {
            "run_dir": "unused",
            "model": {"name": model, "dtype": dtype, "prepack_weights": prepack},
            "data": {"path": "unused"},
            "device": {"epochs": 1, "batch_size": BATCH},
            "tuning": tuning_config,
        }
    )
    backbone = Backbone(config.model, config.tuning, description, torch.device("cpu"))
    shape = read_shape(model)
    tuning = make_tuning(config.tuning, shape, num_classes=len(description.class_names))
    layers = tuple(range(shape.num_layers))
    start, local = tuning.split(tuning.initial(0), layers)
    assignments = [
        Assignment(device=i, state=DeviceState(local=local), examples=np.arange(i * TEXTS, (i + 1) * TEXTS))
        for i in range(DEVICES)
    ]

    def train(pack, turn):
        for first in range(0, DEVICES, pack):
            for _ in local_updates(
                config,
                backbone,
                tuning,
                layers,
                start=start,
                assignments=assignments[first : first + pack],
                split=split,
                round_index=turn,
                pack=pack,
            ):
                pass

    name = f"{'prepacked' if prepack else 'fedhpc'}, "
    return {f"{name}{pack} at a time": (partial(train, pack), backbone.base) for pack in (1, DEVICES)}


def peft(model, split, peft_config, dtype, words, *, classifier):
    """A function that trains as many devices one by one."""
    more = {"dtype": getattr(torch, dtype), "pad_token_id": split.pad_id}
    if classifier:
        plain = AutoModelForSequenceClassification.from_pretrained(model, num_labels=len(words), **more)
    else:
        plain = AutoModelForCausalLM.from_pretrained(model, **more)
    wrapped = get_peft_model(plain, peft_config(task_type=TaskType.SEQ_CLS if classifier else TaskType.CAUSAL_LM))
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=5e-3)
    rng = np.random.default_rng(1)

    def train(_turn):
        for device in range(DEVICES):
            order = device * TEXTS + rng.permutation(TEXTS)
            for first in range(0, TEXTS, BATCH):
                batch = split.batch(order[first : first + BATCH])
                mask = batch.attention_mask.long()
                if classifier:
                    loss = wrapped(input_ids=batch.input_ids, attention_mask=mask, labels=batch.labels).loss
                else:
                    logits = wrapped(input_ids=batch.input_ids, attention_mask=mask).logits
                    at_slots = logits[torch.arange(len(batch.slots)), batch.slots][:, words].float()
                    loss = nn.functional.cross_entropy(at_slots, batch.labels)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(wrapped.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                loss.item()

    return {f"PEFT, {'a classifier' if classifier else 'class words'}": (train, plain.base_model)}


def evaluations(model, data, dtype):
    """Functions that evaluate a share of EVALUATED texts, personalised and global, as they are and padded."""
    tuning_config = section_of(TUNINGS, kind="prompt", num_tokens=NUM_TOKENS)
    plain, prepacked = (
        Backbone(
            ModelConfig(name=model, dtype=dtype, prepack_weights=prepack),
            tuning_config,
            data.description,
            torch.device("cpu"),
        )
        for prepack in (False, True)
    )
    tuning = make_tuning(tuning_config, read_shape(model), num_classes=len(data.description.class_names))
    split, rng = data.split("train"), np.random.default_rng(2)
    examples = rng.choice(len(split), EVALUATED, replace=False)
    of_device = np.split(examples, EVALUATING)
    own = [tuning.initial(seed) for seed in range(EVALUATING)]

    def predict(backbone, batches):
        found = np.full(len(split), -1)
        tensors = ([(as_parameters(own[i], backbone.torch_device), part) for i, part in batch] for batch in batches)
        for chosen, scores in class_scores(backbone, tuning, split, tensors):
            found[chosen] = scores.argmax(1)
        return found[examples]

    def evaluate(backbone, share, *, side_by_side=True):
        size = int(share * EVALUATED / EVALUATING)
        shares = {device: chosen[:size] for device, chosen in enumerate(of_device)}
        everything = evaluation_batches(split, np.concatenate(list(shares.values())), EVALUATION_BATCH)
        personal = device_batches(split, shares, EVALUATION_BATCH, side_by_side=side_by_side)
        everyone = [[(0, chosen)] for chosen in everything]
        return np.concatenate([predict(backbone, personal), predict(backbone, everyone)])

    def padded():
        with plain._padded():
            return evaluate(plain, 1.0, side_by_side=False)

    return {
        "in rows": lambda: evaluate(plain, 1.0),
        "prepacked": lambda: evaluate(prepacked, 1.0),
        "a fifth of the texts": lambda: evaluate(plain, 0.2),
        "a fifth, prepacked": lambda: evaluate(prepacked, 0.2),
        "padded": padded,
    }


def computed(work, base):
    """Tokens that pass through the first layer's linear modules in some work."""
    counts = []
    module = next(m for name, m in base.named_modules() if isinstance(m, nn.Linear) and "mlp" in name)
    hook = module.register_forward_hook(lambda module, inputs, output: counts.append(output[..., 0].numel()))
    work(0)
    hook.remove()
    return sum(counts)


def summary(rates, work):
    """Everyone's texts a second, and how many times as many as those of PEFT's loops."""
    own = {who: rate for who, rate in rates.items() if "PEFT" not in who}
    parts = [", ".join(f"{who} {rate:.2f}/s ({work[who]:.2f} tokens)" for who, rate in rates.items())]
    for peft in [who for who in rates if who not in own]:
        parts.append(f"times {peft} " + ", ".join(f"{rate / rates[peft]:.2f}" for rate in own.values()))
    return "; ".join(parts)


def evaluated(model, data, dtype):
    """The figures of an evaluation, each way to do it against padded batches; they are printed, too."""
    ways, seconds, classes = evaluations(model, data, dtype), {}, {}
    for _ in range(2):
        for how, work in ways.items():
            began = time.perf_counter()
            classes[how] = work()
            seconds.setdefault(how, []).append(time.perf_counter() - began)
    shares = {how: min(found) / min(seconds["padded"]) for how, found in seconds.items()}
    same = {how: float(np.mean(classes[how] == classes["padded"])) for how in ("in rows", "prepacked")}
    print(f"evaluation of {data.path.name}, {dtype}, share of padded time: {shares}; same classes {same}", flush=True)
    return {"texts": data.path.name, "dtype": dtype, "evaluation": shares, "same classes": same}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("prepared", type=Path, nargs="+")
    parser.add_argument("--texts", type=Path)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KERNELS_KEPT))
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    folders = [PreparedData.open(path, verify=False) for path in arguments.prepared]
    sets = {
        data.path.name: (data.description, some_texts(data.split("train"), np.random.default_rng(0)))
        for data in folders
    }
    if arguments.texts:
        split = texts_of(arguments.texts, arguments.model, np.random.default_rng(0))
        about = {"train": {"longest": int(split.lengths.max())}}
        sets[arguments.texts.parent.name] = (replace(folders[0].description, splits=about), split)
    figures = []
    for name, (description, split) in sets.items():
        for dtype in arguments.dtypes:
            for kind, (tuning_config, peft_config) in KINDS.items():
                contenders = {}
                for prepack in (False, True):
                    contenders |= ours(arguments.model, description, split, tuning_config, dtype, prepack=prepack)
                words = [ids[0] for ids in description.word_ids]
                for classifier in (False, True):
                    contenders |= peft(arguments.model, split, peft_config, dtype, words, classifier=classifier)
                work = {who: computed(*each) / len(split.tokens) for who, each in contenders.items()}
                times = {who: [] for who in contenders}
                for turn in range(arguments.turns):
                    for who, (train, _) in contenders.items():
                        began = time.perf_counter()
                        train(1 + turn)
                        times[who].append(time.perf_counter() - began)
                rates = {who: len(split) / statistics.median(found) for who, found in times.items()}
                figures.append({"texts": name, "dtype": dtype, "tuning": kind, "texts/s": rates, "tokens/token": work})
                lengths = f"tokens: median {np.median(split.lengths):.0f}, at most {split.lengths.max()}"
                print(f"{name} ({lengths}), {dtype}, {kind}: {summary(rates, work)}", flush=True)
    figures += [evaluated(arguments.model, data, dtype) for data in folders for dtype in arguments.dtypes]
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
