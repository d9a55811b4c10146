"""A decoder on texts of real lengths, training and evaluation, against a plain re-creation of the released code.

    python benchmarks/decoder.py PREPARED... [--json FILE]

PREPARED: folders that `fedhpc prepare` wrote; their lengths and classes count, their tokens do not. A LLaMA-shaped
backbone (4 layers x 256, random weights), 20 prompt tokens, one CPU thread. The other side pads to 128 tokens, scores
the whole vocabulary, and in evaluation runs one forward pass for each class. Both take turns; medians.
"""

import argparse
import copy
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from local_step import written_out_attention
from torch.nn import functional
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from fedhpc.checkpoint.device_state import DeviceState
from fedhpc.config import Config
from fedhpc.data.prepared import Batch, PreparedData, Split
from fedhpc.device.local_update import Assignment, local_updates
from fedhpc.evaluate.predictions import class_scores, evaluation_batches
from fedhpc.model.backbone import Backbone
from fedhpc.model.pretrained import read_shape
from fedhpc.tuning import make_tuning
from fedhpc.tuning.base import as_parameters

NUM_TOKENS, BATCH, EVALUATION_BATCH, EXAMPLES, MAX_LENGTH = 20, 8, 32, 64, 128


def random_texts(data, name, vocabulary):
    """So many examples of a split, with its lengths and classes, but other tokens."""
    split, rng = data.split(name), np.random.default_rng(0)
    chosen = rng.choice(len(split), EXAMPLES, replace=False)
    lengths = np.minimum(split.lengths[chosen], MAX_LENGTH)
    return Split(
        tokens=rng.integers(3, vocabulary, lengths.sum()).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        labels=np.asarray(split.labels)[chosen],
        slots=(lengths - 1).astype(np.int32),
        pad_id=0,
    )


def padded(batch):
    """The same batch, with texts of 128 tokens."""
    wider = (0, MAX_LENGTH - batch.input_ids.shape[1])
    return replace(
        batch,
        input_ids=functional.pad(batch.input_ids, wider),
        attention_mask=functional.pad(batch.attention_mask, wider),
    )


class Published:
    """The released code's way with a decoder."""

    def __init__(self, folder, prompts, words):
        AttentionInterface.register("written_out", written_out_attention)
        self.model = LlamaForCausalLM.from_pretrained(folder).requires_grad_(False)
        self.model.set_attn_implementation("written_out")
        self.prefix = torch.nn.Parameter(torch.tensor(prompts))
        self.words = torch.tensor(words)

    def logits(self, batch: Batch):
        b, s = batch.input_ids.shape
        mask = batch.attention_mask[:, None, None] & torch.ones(s, s, dtype=torch.bool).tril()
        positions = torch.arange(NUM_TOKENS, NUM_TOKENS + s).expand(b, s)
        hidden = self.model.model(
            batch.input_ids, attention_mask=mask, position_ids=positions, past=self.prefix, use_cache=False
        ).last_hidden_state
        return self.model.lm_head(hidden[torch.arange(b), batch.slots])

    def train(self, split):
        model = copy.deepcopy(self)
        optimizer = torch.optim.AdamW([model.prefix], lr=5e-3, foreach=False)
        for first in range(0, len(split), BATCH):
            batch = padded(split.batch(np.arange(first, first + BATCH)))
            loss = functional.cross_entropy(model.logits(batch), model.words[batch.labels])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_([model.prefix], 1.0)
            optimizer.step()
            loss.item()

    @torch.no_grad()
    def evaluate(self, split):
        for first in range(0, len(split), EVALUATION_BATCH):
            batch = padded(split.batch(np.arange(first, first + EVALUATION_BATCH)))
            torch.stack([self.logits(batch).log_softmax(-1)[:, word] for word in self.words], dim=1).argmax(1)


def contenders(folder, data):
    """What each side does in training and in evaluation."""
    count = len(data.description.class_names)
    words = [100 + 7 * word for word in range(count)]
    longest = {name: {**about, "longest": MAX_LENGTH} for name, about in data.description.splits.items()}
    description = replace(
        data.description, kind="decoder", head="verbalizer", word_ids=[[word] for word in words], splits=longest
    )
    config = Config.model_validate(
        {
            "run_dir": "unused",
            "model": {"name": str(folder)},
            "data": {"path": "unused"},
            "device": {"epochs": 1, "batch_size": BATCH},
            "tuning": {"num_tokens": NUM_TOKENS},
        }
    )
    backbone = Backbone(config.model, config.tuning, description, torch.device("cpu"))
    tuning = make_tuning(config.tuning, read_shape(str(folder)), num_classes=count)
    tensors, layers = tuning.initial(0), tuple(range(4))
    start, local = tuning.split(tensors, layers)
    train, validation = (random_texts(data, name, 32000) for name in ("train", "validation"))
    assignment = Assignment(device=0, state=DeviceState(local=local), examples=np.arange(EXAMPLES))
    published = Published(folder, tensors["prompts"], words)

    def our_training():
        for _ in local_updates(
            config, backbone, tuning, layers, start=start, assignments=[assignment], split=train, round_index=0
        ):
            pass

    def our_evaluation():
        batches = evaluation_batches(validation, np.arange(EXAMPLES), EVALUATION_BATCH)
        params = as_parameters(tensors, backbone.torch_device)
        for _ in class_scores(backbone, tuning, validation, ([(params, batch)] for batch in batches)):
            pass

    return {
        "training": (our_training, lambda: published.train(train)),
        "evaluation": (our_evaluation, lambda: published.evaluate(validation)),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prepared", type=Path, nargs="+")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        shape = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8}
        LlamaForCausalLM(LlamaConfig(vocab_size=32000, **shape)).save_pretrained(folder)
        for path in arguments.prepared:
            data = PreparedData.open(path, verify=False)
            for what, sides in contenders(folder, data).items():
                times = [[], []]
                for turn in range(arguments.turns + 1):
                    for side, go in zip(times, sides, strict=True):
                        began = time.perf_counter()
                        go()
                        if turn:
                            side.append(time.perf_counter() - began)
                ours, theirs = (EXAMPLES / statistics.median(side) for side in times)
                figures.append({"task": data.description.task, "what": what, "ours": ours, "published": theirs})
                print(
                    f"{data.description.task}, {what}: {ours:.0f} examples/s, "
                    f"published {theirs:.0f}: {ours / theirs:.2f}"
                )
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
