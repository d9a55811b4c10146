"""Local steps on a GPU: examples per second, share of the card's matrix rate, memory; 1 to 32 devices side by side.

    python benchmarks/gpu.py [--json FILE] [--small]

Backbones have random weights in the shapes of RoBERTa large and LLaMA 7B, in bfloat16; 20 prompt tokens, batch 8, texts
of 64 tokens. The matrix rate is that of a large bfloat16 product, measured before and after. A step's work is counted
as 4 operations for each backbone parameter, embeddings left out, and token: a forward pass, and the gradients of the
activations. `--small` tries the program itself, with tiny shapes and on whatever is there.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from local_step import NUM_TOKENS, WORDS
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, LlamaConfig, RobertaConfig
from transformers.utils import logging

from fedhpc.checkpoint.device_state import DeviceState
from fedhpc.config import Config
from fedhpc.data.prepared import Description, Split
from fedhpc.device.local_update import Assignment, local_updates
from fedhpc.device.processor import choose_torch_device
from fedhpc.job.environment import JobEnvironment
from fedhpc.model.backbone import Backbone
from fedhpc.model.pretrained import read_shape
from fedhpc.tuning import make_tuning

BATCH, LENGTH, STEPS, TURNS = 8, 64, 4, 5
PACKS = (1, 2, 4, 8, 16, 32)
MATRIX = 8192


def shapes(small):
    """Kind and configuration of each backbone by name."""
    common = {"vocab_size": 50265, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
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
        "LLaMA 7B": ("decoder", LlamaConfig(max_position_embeddings=2048, **{**common, "vocab_size": 32000}, **llama)),
    }


def save_backbone(folder, kind, shape, place):
    """Random weights in a folder; their number without embeddings."""
    loader = AutoModelForMaskedLM if kind == "encoder" else AutoModelForCausalLM
    torch.manual_seed(0)
    with place:
        model = loader.from_config(shape, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return sum(p.numel() for name, p in model.named_parameters() if "embed" not in name and "lm_head" not in name)


def make_step(folder, kind, place):
    """A function that trains so many devices side by side, STEPS steps each."""
    config = Config.model_validate(
        {
            "run_dir": "unused",
            "model": {"name": str(folder), "dtype": "bfloat16"},
            "data": {"path": "unused"},
            "device": {"epochs": 1, "batch_size": BATCH},
            "tuning": {"num_tokens": NUM_TOKENS},
        }
    )
    rng = np.random.default_rng(0)
    count = BATCH * STEPS
    split = Split(
        tokens=rng.integers(1000, 30000, count * LENGTH).astype(np.int32),
        offsets=np.arange(count + 1) * LENGTH,
        labels=rng.integers(0, len(WORDS), count).astype(np.int32),
        slots=np.full(count, LENGTH - 1, np.int32),
        pad_id=1,
    )
    description = Description(
        task="random",
        head="verbalizer",
        kind=kind,
        model=str(folder),
        tokenizer_sha256="",
        pad_id=1,
        max_length=LENGTH,
        template="",
        class_names=[str(word) for word in WORDS],
        class_words=[str(word) for word in WORDS],
        word_ids=WORDS,
        metric="accuracy",
        splits={"train": {"longest": LENGTH}},
        files={},
    )
    tuning = make_tuning(config.tuning, read_shape(str(folder)), num_classes=len(WORDS))
    backbone = Backbone(config.model, config.tuning, description, place)
    layers = tuple(range(tuning.shape.num_layers))
    start, local = tuning.split(tuning.initial(0), layers)

    def step(pack):
        examples = np.arange(count)
        assignments = [Assignment(device=i, state=DeviceState(local=local), examples=examples) for i in range(pack)]
        for _ in local_updates(
            config,
            backbone,
            tuning,
            layers,
            start=start,
            assignments=assignments,
            split=split,
            round_index=0,
            pack=pack,
        ):
            pass

    return step


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


def fits(step, pack):
    """Make the step; whether there is memory for it."""
    try:
        step(pack)
    except torch.OutOfMemoryError:
        return False
    return True


def measure(step, packs, place):
    """Seconds of an epoch of each pack that fits, medians over turns in which all have one go; their peak memory."""
    times, peaks = {pack: [] for pack in packs}, {}
    for turn in range(TURNS + 1):
        for pack in list(times):
            if place.type == "cuda":
                torch.cuda.reset_peak_memory_stats(place)
            wait(place)
            began = time.perf_counter()
            if not fits(step, pack):
                torch.cuda.empty_cache()
                times = {smaller: found for smaller, found in times.items() if smaller < pack}
                break
            wait(place)
            if turn:
                times[pack].append(time.perf_counter() - began)
            if place.type == "cuda":
                peaks[pack] = torch.cuda.max_memory_allocated(place) / 2**30
    return {pack: statistics.median(found) for pack, found in times.items()}, peaks


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--small", action="store_true", help="tiny shapes, also without a GPU")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() and not arguments.small:
        sys.exit("no GPU that PyTorch can use; --small tries the program without one")
    place = choose_torch_device(0, JobEnvironment())  # with a job's settings
    logging.set_verbosity_error()
    rates = [matrix_rate(place, arguments.small)]
    figures = []
    for name, (kind, shape) in shapes(arguments.small).items():
        with tempfile.TemporaryDirectory() as folder:
            parameters = save_backbone(folder, kind, shape, place)
            step = make_step(folder, kind, place)
        seconds, peaks = measure(step, PACKS[:3] if arguments.small else PACKS, place)
        figures.append({"shape": name, "parameters": parameters, "seconds": seconds, "peak_GiB": peaks})
    rates.append(matrix_rate(place, arguments.small))
    rate = statistics.mean(rates)
    print(f"{torch.cuda.get_device_name(place) if place.type == 'cuda' else 'CPU'}: {rate / 1e12:.1f} T operations/s")
    for found in figures:
        print(f"{found['shape']}, {found['parameters'] / 1e9:.2f} G parameters without embeddings")
        for pack, seconds in found["seconds"].items():
            examples = pack * BATCH * STEPS / seconds
            share = 4 * found["parameters"] * LENGTH * examples / rate
            memory = f", peak {found['peak_GiB'][pack]:.1f} GiB" if found["peak_GiB"] else ""
            gain = pack * found["seconds"][1] / seconds
            print(
                f"  {pack:2} side by side: {examples:.0f} examples/s, {share:.0%} of the rate, {gain:.2f} x one{memory}"
            )
    if arguments.json:
        arguments.json.write_text(json.dumps({"operations_per_s": rate, "shapes": figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
