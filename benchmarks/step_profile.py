"""Where the time of local steps goes on a real decoder: fedhpc's, with prepacked weights, and PEFT's plain loop.

    python benchmarks/step_profile.py MODEL PREPARED [--dtype bfloat16] [--json FILE]

MODEL, PREPARED and the work as in `benchmarks/real_decoder.py`. Milliseconds for each text, by PyTorch's profiler, that
itself makes small operations longer: in products of matrices, in attention, and in all else.
"""

import argparse
import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from real_decoder import KINDS, ours, peft, some_texts
from torch.profiler import ProfilerActivity, profile
from transformers.utils import logging

from fedhpc.commands.role import KERNELS_KEPT
from fedhpc.data.prepared import PreparedData

PARTS = {"products": ("mm", "linear_pointwise"), "attention": ("scaled_dot_product",)}
"""What is in the names of their operations; the first part that fits counts."""


def shares(train, count):
    """Milliseconds a text of each part of some training, after one that warms up."""
    train(0)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        train(1)
    parts = Counter()
    for operation in found.key_averages():
        part = next((part for part, names in PARTS.items() if any(name in operation.key for name in names)), "all else")
        parts[part] += operation.self_cpu_time_total / 1e3 / count
    return parts


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("prepared", type=Path)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KERNELS_KEPT))
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    data = PreparedData.open(arguments.prepared, verify=False)
    split = some_texts(data.split("train"), np.random.default_rng(0))
    words, figures = [ids[0] for ids in data.description.word_ids], {}
    for kind, (tuning_config, peft_config) in KINDS.items():
        contenders = peft(arguments.model, split, peft_config, arguments.dtype, words, classifier=False)
        for prepack in (False, True):
            contenders |= ours(
                arguments.model, data.description, split, tuning_config, arguments.dtype, prepack=prepack
            )
        for who, (train, _) in contenders.items():
            parts = figures[f"{kind}, {who}"] = shares(train, len(split))
            print(f"{kind}, {who}: " + ", ".join(f"{part} {ms:.1f} ms" for part, ms in parts.items()), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
