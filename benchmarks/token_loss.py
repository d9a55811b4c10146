"""A training step with the loss over a large vocabulary, against transformers' own loss of the same model.

    python benchmarks/token_loss.py MODEL [--json FILE]

MODEL: a folder with a pretrained decoder, as Gemma 3 270M with its 262,144 words. Batches of eight texts of 128 tokens,
of which all but the first are trained, with LoRA. The other side is PEFT with `labels`, which has the logits of all
tokens at once. Memory is what a process of its own takes at most during three steps, above what it had before them;
time is the median of steps that take turns in one process. One CPU thread.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from fedhpc.config import section_of
from fedhpc.config.sections import ModelConfig
from fedhpc.data.prepared import Description, Split
from fedhpc.model.backbone import Backbone
from fedhpc.model.pretrained import read_shape
from fedhpc.registry import TUNINGS
from fedhpc.tuning import make_tuning
from fedhpc.tuning.base import as_parameters

BATCH, LENGTH, RANK = 8, 128, 8
SIDES = ("fedhpc", "transformers")


def texts(model):
    """A split of one batch, of words from all over the vocabulary."""
    words, count = read_shape(model).vocabulary_size, BATCH * LENGTH
    offsets = np.arange(BATCH + 1) * LENGTH
    return Split(
        tokens=np.random.default_rng(0).integers(10, words - 10, count).astype(np.int32),
        offsets=offsets,
        labels=np.zeros(BATCH, np.int32),
        slots=np.full(BATCH, LENGTH - 1, np.int32),
        pad_id=0,
        spans=np.stack([offsets[:-1] + 1, offsets[1:]], axis=1).ravel(),
    )


def ours(model, dtype):
    """A step of fedhpc, without the optimizer."""
    facts = {
        "kind": "decoder",
        "model": model,
        "head": "language_model",
        "metric": "",
        "template": "",
        "task": "random",
    }
    description = Description(
        **facts, tokenizer_sha256="", pad_id=0, max_length=LENGTH, class_names=[], class_words=[], word_ids=[],
        splits={"train": {"longest": LENGTH}}, files={},
    )  # fmt: skip
    config = section_of(TUNINGS, kind="lora", rank=RANK, head="language_model")
    backbone = Backbone(ModelConfig(name=model, dtype=dtype), config, description, torch.device("cpu"))
    tuning = make_tuning(config, read_shape(model), num_classes=0)
    params, batch = as_parameters(tuning.initial(0), torch.device("cpu")), texts(model).batch(range(BATCH))

    def step():
        backbone.gradients(tuning.loss_terms(backbone, [params], batch).mean(), list(params.values()))

    return step


def theirs(model, dtype):
    """The same by transformers and PEFT."""
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
    wrapped = get_peft_model(plain, LoraConfig(r=RANK, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    batch = texts(model).batch(range(BATCH))

    def step():
        wrapped(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask.long(), labels=batch.input_ids
        ).loss.backward()
        wrapped.zero_grad()

    return step


def make(side, model, dtype):
    """The step of a side."""
    return {"fedhpc": ours, "transformers": theirs}[side](model, dtype)


def peak(side, model, dtype):
    """Bytes that three steps take at most, above what was taken before them; called in a process of its own."""
    step = make(side, model, dtype)
    for weight in (each for each in step.__closure__ if hasattr(each.cell_contents, "parameters")):
        sum(float(parameter.sum()) for parameter in weight.cell_contents.parameters())  # a mapped file is read by that
    status = Path("/proc/self/status").read_text()
    before = 1024 * int(status.split("VmRSS:")[1].split()[0])
    for _ in range(3):
        step()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--peak", choices=SIDES, help="measure the memory of one side, in this process")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    if arguments.peak:
        print(peak(arguments.peak, arguments.model, arguments.dtype))
        return
    memory = {}
    for side in SIDES:
        command = [sys.executable, __file__, arguments.model, "--dtype", arguments.dtype, "--peak", side]
        memory[side] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
    steps = {side: make(side, arguments.model, arguments.dtype) for side in SIDES}
    times = {side: [] for side in SIDES}
    for turn in range(arguments.turns + 1):
        for side, step in steps.items():
            began = time.perf_counter()
            step()
            if turn:  # the first one warms up
                times[side].append(time.perf_counter() - began)
    seconds = {side: statistics.median(each) for side, each in times.items()}
    ratios = {what: each["fedhpc"] / each["transformers"] for what, each in (("memory", memory), ("time", seconds))}
    print(
        f"{arguments.dtype}: a step takes {memory['fedhpc'] / 2**20:.0f} MiB of {memory['transformers'] / 2**20:.0f} "
        f"({ratios['memory']:.2f}), and {seconds['fedhpc']:.2f} s of {seconds['transformers']:.2f} "
        f"({ratios['time']:.2f})"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps({"bytes": memory, "seconds": seconds, "ratios": ratios}, indent=2) + "\n")


if __name__ == "__main__":
    main()
