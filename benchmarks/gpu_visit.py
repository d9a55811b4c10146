"""All that is to be known of a GPU, in one visit of a few minutes: speed, memory, padding, packs, same bits.

    python benchmarks/gpu_visit.py --json FILE [--model FOLDER] [--minutes 9] [--small]

Backbones have random weights in the shapes of RoBERTa large and LLaMA 7B, in bfloat16; FOLDER: a pretrained decoder
too, as SmolLM2-135M. 20 prompt tokens or LoRA, batch 8, texts of 5 to 64 tokens as short sentences have them. Of each:

- examples a second with 1 to 32 devices side by side, texts one behind the other, and padded to the longest of a batch;
- the share of the card's matrix rate, that of a large bfloat16 product, measured before and after. A step's work is
  counted as 4 operations for each backbone parameter, embeddings left out, and token of a text: a forward pass, and the
  gradients of the activations;
- peak memory;
- whether the same update twice, and one that was stopped after some steps and went on, have the same bits.

FILE is written anew after each figure; what the minutes do not suffice for is named in it. `--small` tries the program
itself, with tiny shapes and on whatever is there.
"""

import argparse
import hashlib
import json
import statistics
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from local_step import NUM_TOKENS, WORDS
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, LlamaConfig, RobertaConfig
from transformers.utils import logging

from fedhpc.checkpoint.device_state import DeviceState, UnfinishedUpdate
from fedhpc.config import Config
from fedhpc.data.prepared import Description, Split
from fedhpc.device.local_update import Assignment, local_updates
from fedhpc.device.processor import choose_torch_device
from fedhpc.errors import Halt
from fedhpc.job.environment import job_environment
from fedhpc.model.backbone import Backbone
from fedhpc.model.pretrained import read_shape
from fedhpc.tuning import make_tuning

BATCH, STEPS, TURNS = 8, 4, 3
TRIED = (1, 2)
"""Packs, where the program itself is tried."""
SHORTEST, LONGEST = 5, 64
PACKS = (1, 2, 4, 8, 16, 32)
MATRIX = 8192
KINDS = {"deep prompts": {"kind": "prompt", "num_tokens": NUM_TOKENS}, "LoRA": {"kind": "lora"}}


class Visit:
    """What was found, and how much time is left."""

    def __init__(self, file, minutes):
        self.file, self.ends = file, time.monotonic() + 60 * minutes
        self.found = {"skipped": []}

    def note(self, *path, value):
        """Keep a figure, in memory and in the file."""
        place = self.found
        for name in path[:-1]:
            place = place.setdefault(str(name), {})
        place[str(path[-1])] = value
        print(f"{', '.join(map(str, path))}: {value}", flush=True)
        self.file.write_text(json.dumps(self.found, indent=2) + "\n")

    def has_time_for(self, seconds, what):
        """Whether so many seconds are left; what has to be skipped is noted."""
        if self.ends - time.monotonic() > seconds:
            return True
        self.note("skipped", value=[*self.found["skipped"], what])
        return False


def shapes(small):
    """Kind and configuration of each backbone by name."""
    common = {"vocab_size": 2000 if small else 50265, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    roberta = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    llama = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11008}
    if small:
        tiny = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
        roberta, llama = tiny, tiny
    return {
        "RoBERTa large": (
            "encoder",
            RobertaConfig(max_position_embeddings=514, type_vocab_size=1, **common, **roberta),
        ),
        "LLaMA 7B": (
            "decoder",
            LlamaConfig(
                max_position_embeddings=2048, **{**common, **({} if small else {"vocab_size": 32000})}, **llama
            ),
        ),
    }


def save_backbone(folder, kind, shape, place):
    """Random weights in a folder."""
    loader = AutoModelForMaskedLM if kind == "encoder" else AutoModelForCausalLM
    torch.manual_seed(0)
    with place:
        loader.from_config(shape, dtype=torch.bfloat16).save_pretrained(folder)


def some_texts(count, seed=0):
    """A split of texts with random tokens; most are short."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(2.8, 0.6, count).astype(int), SHORTEST, LONGEST)
    texts = [(rng.integers(1000, 2000, length), length - 1) for length in lengths]
    return Split.of(texts, rng.integers(0, len(WORDS), count), pad_id=1)


class Trainer:
    """Local updates of so many devices side by side."""

    def __init__(self, folder, kind, tuning_config, place):
        self.config = Config.model_validate(
            {
                "run_dir": "unused",
                "model": {"name": str(folder), "dtype": "bfloat16"},
                "data": {"path": "unused"},
                "device": {"epochs": 1, "batch_size": BATCH},
                "tuning": tuning_config,
            }
        )
        description = Description(
            task="random",
            head="verbalizer",
            kind=kind,
            model=str(folder),
            tokenizer_sha256="",
            pad_id=1,
            max_length=LONGEST,
            template="",
            class_names=[str(word) for word in WORDS],
            class_words=[str(word) for word in WORDS],
            word_ids=WORDS,
            metric="accuracy",
            splits={"train": {"longest": LONGEST}},
            files={},
        )
        self.split, self.place = some_texts(max(PACKS) * BATCH * STEPS), place
        self.tuning = make_tuning(self.config.tuning, read_shape(str(folder)), num_classes=len(WORDS))
        self.backbone = Backbone(self.config.model, self.config.tuning, description, place)
        self.layers = tuple(range(self.tuning.shape.num_layers))
        self.start, self.local = self.tuning.split(self.tuning.initial(0), self.layers)
        weights = self.backbone.model.named_parameters()
        self.parameters = sum(p.numel() for name, p in weights if "embed" not in name and "lm_head" not in name)

    def train(self, pack, *, begun=(), beat=lambda activity: None):
        """The updates of so many devices, in the order of the devices."""
        per_device = BATCH * STEPS
        assignments = [
            Assignment(
                device=i,
                state=DeviceState(local=self.local),
                examples=np.arange(i * per_device, (i + 1) * per_device),
                begun=begun[i] if begun else None,
            )
            for i in range(pack)
        ]
        updates = local_updates(
            self.config,
            self.backbone,
            self.tuning,
            self.layers,
            start=self.start,
            assignments=assignments,
            split=self.split,
            round_index=0,
            pack=pack,
            beat=beat,
        )
        found = {}
        try:
            for device, update in updates:
                found[device] = update
        except Halt:
            pass
        return [found[device] for device in sorted(found)]

    def tokens(self, pack):
        """Of the texts that so many devices train on."""
        return int(self.split.lengths[: pack * BATCH * STEPS].sum())


def stopped_and_resumed(trainer, pack):
    """The updates of devices that were stopped before their third step."""
    steps = 0

    def stop(_activity):
        nonlocal steps
        steps += 1
        if steps == 3:
            raise Halt

    begun = trainer.train(pack, beat=stop)
    assert all(isinstance(update, UnfinishedUpdate) for update in begun)
    return trainer.train(pack, begun=begun)


def sha256(updates):
    """Of all that devices would upload."""
    return hashlib.sha256(b"".join(update.params.tobytes() for update in updates)).hexdigest()


def matrix_rate(place, small):
    """Operations per second of a bfloat16 product."""
    size = 256 if small else MATRIX
    a = torch.randn(size, size, dtype=torch.bfloat16, device=place)
    seconds = []
    for _ in range(10):
        wait(place)
        began = time.perf_counter()
        for _ in range(5):
            a @ a
        wait(place)
        seconds.append((time.perf_counter() - began) / 5)
    return 2 * size**3 / statistics.median(seconds)


def wait(place):
    if place.type == "cuda":
        torch.cuda.synchronize(place)


def measure(visit, name, trainer, packs, turns, rate):
    """Note examples a second and memory of each pack that fits, in rows and padded, which take turns."""
    place, seconds = trainer.place, 0.0
    for pack in packs:
        if not visit.has_time_for(4 * seconds, f"{name}, {pack} side by side"):
            return
        times = {"in rows": [], "padded": []}
        try:
            for turn in range(turns + 1):
                for how, found in times.items():
                    with trainer.backbone._padded() if how == "padded" else nullcontext():
                        if place.type == "cuda":
                            torch.cuda.reset_peak_memory_stats(place)
                        wait(place)
                        began = time.perf_counter()
                        trainer.train(pack)
                        wait(place)
                        if turn:
                            found.append(time.perf_counter() - began)
                        elif place.type == "cuda":
                            peak = torch.cuda.max_memory_allocated(place) / 2**30
                            visit.note(name, pack, how, "peak GiB", value=round(peak, 2))
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            visit.note(name, pack, value="does not fit")
            return
        for how, found in times.items():
            seconds = statistics.median(found)
            visit.note(name, pack, how, "examples/s", value=round(pack * BATCH * STEPS / seconds, 1))
            share = 4 * trainer.parameters * trainer.tokens(pack) / seconds / rate
            visit.note(name, pack, how, "share of the matrix rate", value=round(share, 3))
        seconds = sum(sum(found) for found in times.values())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, help="write the figures here")
    parser.add_argument("--model", type=Path, help="a pretrained decoder")
    parser.add_argument("--minutes", type=float, default=9.0, help="end within so many")
    parser.add_argument("--small", action="store_true", help="tiny shapes, also without a GPU")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() and not arguments.small:
        sys.exit("no GPU that PyTorch can use; --small tries the program without one")
    visit = Visit(arguments.json, arguments.minutes)
    place = choose_torch_device(0, job_environment())  # with a job's settings
    logging.set_verbosity_error()
    visit.note("device", value=torch.cuda.get_device_name(place) if place.type == "cuda" else "CPU")
    visit.note("PyTorch", value=torch.__version__)
    rate = matrix_rate(place, arguments.small)
    visit.note("matrix rate, T operations/s", value=round(rate / 1e12, 3))
    memory = Path("/dev/shm")  # 13 GB of weights are written and read at once there
    backbones = shapes(arguments.small) | ({"pretrained": ("decoder", None)} if arguments.model else {})
    for name, (kind, shape) in backbones.items():
        if not visit.has_time_for(0 if arguments.small else 60, name):
            continue
        with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as temporary:
            folder = temporary if shape else arguments.model
            if shape:
                save_backbone(folder, kind, shape, place)
            for tuning, keys in KINDS.items():
                who = f"{name}, {tuning}"
                began = time.monotonic()
                trainer = Trainer(folder, kind, keys, place)
                visit.note(who, "seconds to load", value=round(time.monotonic() - began, 1))
                visit.note(who, "texts in rows", value=trainer.backbone._in_rows)
                pack = TRIED[-1] if arguments.small else 4
                first, again, resumed = trainer.train(pack), trainer.train(pack), stopped_and_resumed(trainer, pack)
                visit.note(who, "same bits twice", value=sha256(first) == sha256(again))
                visit.note(who, "same bits after a stop", value=sha256(first) == sha256(resumed))
                measure(visit, who, trainer, *((TRIED, 1) if arguments.small else (PACKS, TURNS)), rate)
                del trainer
                if place.type == "cuda":
                    torch.cuda.empty_cache()
    visit.note("matrix rate at the end, T operations/s", value=round(matrix_rate(place, arguments.small) / 1e12, 3))


if __name__ == "__main__":
    main()
