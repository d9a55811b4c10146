"""One local step against other ways to make it: on a CPU with one thread, or on a GPU.

    python benchmarks/local_step.py [--json FILE]

A RoBERTa-shaped backbone (6 layers x 384, random weights), 20 prompt tokens, batch 8, texts of equal length. `floor` is
a hand-written forward and backward pass of the same backbone with the same prompts, without clipping and optimizer;
`peft` is PEFT's prefix tuning in a plain PyTorch loop; `published` is a plain re-creation of the released code's loop:
attention written out, scores of the whole vocabulary at the answer slot, an optimizer per device that steps tensor by
tensor, a deep copy of the model for every device; `prepacked` is ours with `model.prepack_weights`. All take turns in
one process; figures are medians over the turns.
The second table is of eight devices that train one by one and side by side.
"""

import argparse
import copy
import json
import math
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface, RobertaConfig, RobertaForMaskedLM, RobertaForSequenceClassification
from transformers.utils import logging

from fedhpc.checkpoint.device_state import DeviceState
from fedhpc.config import Config
from fedhpc.data.prepared import Description, Split
from fedhpc.device.local_update import Assignment, local_updates
from fedhpc.model.backbone import Backbone
from fedhpc.model.pretrained import read_shape
from fedhpc.tuning import make_tuning

NUM_TOKENS, BATCH, STEPS, PACK = 20, 8, 4, 8
WORDS = [[100], [200], [300], [400], [500], [600]]
OTHERS = {"prepacked": {"prepack": True}, "bfloat16": {"dtype": "bfloat16"}}
OTHERS["prepacked bfloat16"] = OTHERS["prepacked"] | OTHERS["bfloat16"]
SHAPES = {"6 x 384": (6, 384), "4 x 128": (4, 128)}


class Contest:
    """Everything that the contenders share for one shape of the backbone and one length of the texts."""

    def __init__(self, folder, *, length, dtype="float32", prepack=False, num_layers=6, hidden_size=384):
        self.shape = RobertaConfig(
            num_hidden_layers=num_layers,
            hidden_size=hidden_size,
            num_attention_heads=hidden_size // 32,
            intermediate_size=4 * hidden_size,
            vocab_size=50265,
            max_position_embeddings=514,
            type_vocab_size=1,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        if not folder.exists():
            torch.manual_seed(0)
            RobertaForMaskedLM(self.shape).save_pretrained(folder)
        self.folder, self.length = folder, length
        self.config = Config.model_validate(
            {
                "run_dir": "unused",
                "model": {"name": str(folder), "dtype": dtype, "prepack_weights": prepack},
                "data": {"path": "unused"},
                "device": {"epochs": 1, "batch_size": BATCH},
                "tuning": {"num_tokens": NUM_TOKENS},
            }
        )
        rng = np.random.default_rng(0)
        count = BATCH * STEPS
        self.split = Split(
            tokens=rng.integers(1000, 50000, count * length).astype(np.int32),
            offsets=np.arange(count + 1) * length,
            labels=rng.integers(0, len(WORDS), count).astype(np.int32),
            slots=np.full(count, length // 2, np.int32),
            pad_id=1,
        )
        self.tuning = make_tuning(self.config.tuning, read_shape(str(folder)), num_classes=len(WORDS))
        self.prompts = self.tuning.initial(0)["prompts"]

    def batches(self):
        """The epoch's batches, as everyone gets them."""
        for first in range(0, len(self.split), BATCH):
            yield self.split.batch(np.arange(first, first + BATCH))

    def backbone(self):
        description = Description(
            task="random",
            head="verbalizer",
            kind="encoder",
            model=str(self.folder),
            tokenizer_sha256="",
            pad_id=1,
            max_length=self.length,
            template="",
            class_names=[str(word) for word in WORDS],
            class_words=[str(word) for word in WORDS],
            word_ids=WORDS,
            metric="accuracy",
            splits={"train": {"longest": self.length}},
            files={},
        )
        return Backbone(self.config.model, self.config.tuning, description, torch.device("cpu"))


def ours(contest, *, num_devices=1, pack=1):
    """An epoch of fedhpc's local update on so many devices of equal size."""
    backbone = contest.backbone()
    layers = tuple(range(contest.shape.num_hidden_layers))
    start, local = contest.tuning.split({"prompts": contest.prompts}, layers)
    examples = np.arange(len(contest.split))
    assignments = [Assignment(device=i, state=DeviceState(local=local), examples=examples) for i in range(num_devices)]
    packs = [assignments[first : first + pack] for first in range(0, num_devices, pack)]

    def epoch():
        for assignments in packs:
            for _ in local_updates(
                contest.config,
                backbone,
                contest.tuning,
                layers,
                start=start,
                assignments=assignments,
                split=contest.split,
                round_index=0,
                pack=pack,
            ):
                pass

    return epoch


def floor(contest):
    """Forward and backward pass with nothing around them."""
    model = RobertaForMaskedLM.from_pretrained(contest.folder, dtype=getattr(torch, contest.config.model.dtype))
    w = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    words = [ids[0] for ids in WORDS]
    decoder, bias = w["lm_head.decoder.weight"][words], w["lm_head.decoder.bias"][words]
    heads = contest.shape.num_attention_heads
    batches = list(contest.batches())

    def norm(x, name):
        return functional.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-12)

    def linear(x, name):
        return functional.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def split(x):
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    def forward(prompts, ids, slots):
        b, s = ids.shape
        e = "roberta.embeddings"
        positions = torch.arange(2 + NUM_TOKENS, 2 + NUM_TOKENS + s)
        x = w[f"{e}.word_embeddings.weight"][ids] + w[f"{e}.position_embeddings.weight"][positions]
        x = norm(x + w[f"{e}.token_type_embeddings.weight"][0], f"{e}.LayerNorm")
        prefixes = split(prompts.to(x.dtype).flatten(0, 1)).unflatten(0, (-1, 2))
        for i, prefix in enumerate(prefixes):
            layer = f"roberta.encoder.layer.{i}"
            q, k, v = (split(linear(x, f"{layer}.attention.self.{part}")) for part in ("query", "key", "value"))
            k, v = (torch.cat([p.expand(b, -1, -1, -1), t], dim=2) for p, t in zip(prefix, (k, v), strict=True))
            y = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = norm(linear(y, f"{layer}.attention.output.dense") + x, f"{layer}.attention.output.LayerNorm")
            y = linear(functional.gelu(linear(x, f"{layer}.intermediate.dense")), f"{layer}.output.dense")
            x = norm(y + x, f"{layer}.output.LayerNorm")
        y = norm(functional.gelu(linear(x[torch.arange(b), slots], "lm_head.dense")), "lm_head.layer_norm")
        return functional.linear(y, decoder, bias).float()

    def epoch():
        prompts = torch.tensor(contest.prompts, requires_grad=True)
        for batch in batches:
            loss = functional.cross_entropy(forward(prompts, batch.input_ids, batch.slots), batch.labels)
            torch.autograd.grad(loss, prompts)
            loss.item()

    return epoch


def peft(contest):
    """PEFT's prefix tuning of a sequence classifier, in the loop of its examples."""
    from peft import PrefixTuningConfig, TaskType, get_peft_model

    model = RobertaForSequenceClassification.from_pretrained(contest.folder, num_labels=len(WORDS))
    model = get_peft_model(model, PrefixTuningConfig(task_type=TaskType.SEQ_CLS, num_virtual_tokens=NUM_TOKENS))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    batches = list(contest.batches())

    def epoch():
        for batch in batches:
            output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long(), labels=batch.labels)
            output.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            output.loss.item()

    return epoch


def written_out_attention(module, query, key, value, attention_mask, past=None, **_):
    prefix = past[module.layer_idx].unflatten(2, (key.shape[1], -1)).transpose(1, 2)
    key, value = (torch.cat([p.expand(len(key), -1, -1, -1), t], 2) for p, t in zip(prefix, (key, value), strict=True))
    scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])
    mask = functional.pad(attention_mask, (past.shape[2], 0), value=True)
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = functional.dropout(scores.softmax(-1), 0.0, training=True)
    return (weights @ value).transpose(1, 2).contiguous(), None


class Published(nn.Module):
    """The released code's model: a frozen backbone and its prefixes."""

    def __init__(self, contest):
        super().__init__()
        AttentionInterface.register("written_out", written_out_attention)
        self.model = RobertaForMaskedLM.from_pretrained(contest.folder).requires_grad_(False)
        self.model.set_attn_implementation("written_out")
        self.prefix = nn.Parameter(torch.tensor(contest.prompts))

    def forward(self, batch):
        b, s = batch.input_ids.shape
        mask = batch.attention_mask[:, None, None].expand(b, 1, s, s)
        positions = torch.arange(2 + NUM_TOKENS, 2 + NUM_TOKENS + s).expand(b, s)
        hidden = self.model.roberta(
            batch.input_ids, attention_mask=mask, position_ids=positions, past=self.prefix
        ).last_hidden_state
        logits = self.model.lm_head(hidden[torch.arange(b), batch.slots])
        return functional.cross_entropy(logits, torch.tensor([word for (word,) in WORDS])[batch.labels])


def published(contest):
    """A device of the released code: its own copy of the model, then its epoch."""
    template = Published(contest)
    batches = list(contest.batches())

    def epoch():
        model = copy.deepcopy(template)
        model.train()
        optimizer = torch.optim.AdamW([model.prefix], lr=5e-3, foreach=False)
        for batch in batches:
            loss = model(batch)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_([model.prefix], 1.0)
            optimizer.step()
            loss.item()

    return epoch


def compare(contenders, turns):
    """Milliseconds a step of each, medians over turns in which all have one go."""
    times = {name: [] for name in contenders}
    for turn in range(turns + 1):
        for name, epoch in contenders.items():
            began = time.perf_counter()
            epoch()
            if turn:
                times[name].append((time.perf_counter() - began) / STEPS * 1e3)
    return {name: statistics.median(found) for name, found in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--turns", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        for length in (16, 64):
            contest = Contest(Path(folder) / "model", length=length)
            contenders = {"ours": ours(contest), "floor": floor(contest)}
            contenders |= {"peft": peft(contest), "published": published(contest)}
            for name, how in OTHERS.items():
                contenders[f"ours ({name})"] = ours(Contest(Path(folder) / "model", length=length, **how))
            found = compare(contenders, arguments.turns)
            figures.append({"length": length, "ms": found})
            print(f"length {length}: " + ", ".join(f"{name} {ms:.1f} ms" for name, ms in found.items()))
            for name in ("floor", "peft", "published"):
                mine = ", ".join(f"{who} {found[name] / ms:.3f}" for who, ms in found.items() if who.startswith("ours"))
                print(f"  {name} / {mine}")
        for shape, (num_layers, hidden_size) in SHAPES.items():
            name = Path(folder) / shape.replace(" ", "")
            contest = Contest(name, length=16, num_layers=num_layers, hidden_size=hidden_size)
            contenders = {f"{pack} side by side": ours(contest, num_devices=PACK, pack=pack) for pack in (1, PACK)}
            found = compare(contenders, arguments.turns)
            one, packed = (ms / PACK for ms in found.values())
            figures.append({"shape": shape, "ms_a_device": {"1": one, str(PACK): packed}})
            print(
                f"{shape}, length 16: {one:.2f} ms a device one by one, {packed:.2f} ms with {PACK} side by side: "
                f"{one / packed:.3f}"
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
