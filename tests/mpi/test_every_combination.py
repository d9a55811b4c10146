"""Tunings with server methods, on an encoder or a decoder in turns, and with some to generate text: a process that is
stopped and resumed ends with the bits of three ranks that went through.

Each tuning goes with half of the methods, so that each method meets half of the tunings; with FEDHPC_TEST_ALL=1 in the
environment, with all of them.
"""

import os
from pathlib import Path

import pytest
import torch
import yaml
from launch import MPIRUN, mpirun
from run_each import run
from safetensors.torch import save_file
from tiny import final_tensors, metrics, run_dir, traces, write_world

from fedhpc.exchange.messages import Op
from fedhpc.methods.factors import FactorMethod
from fedhpc.methods.robust import RobustMethod
from fedhpc.registry import METHODS, TUNINGS

pytestmark = pytest.mark.skipif(MPIRUN is None, reason="no mpirun beside this Python or on PATH")

VARIANTS = ("drift_corrected", "paper", "released")
STOP_AT_STEP = 6  # of four in a round
FACTS = ("round", "devices", "steps", "loss", "accuracy", "accuracy_global", "perplexity", "update_norm")
ROBUST = [name for name, part in METHODS.items() if issubclass(part, RobustMethod)]  # one with each tuning, in turns
ALWAYS = (
    "fedavg",
    "drift_corrected",
    *(name for name, part in METHODS.items() if issubclass(part, (FactorMethod, RobustMethod))),
)
COMBINATIONS = [
    ("encoder" if (row + column) % 2 or kind == "bitfit" else "decoder", kind, method)  # a LLaMA has no biases
    for row, kind in enumerate(TUNINGS)
    for column, method in enumerate((*(name for name in METHODS if name != "fedpeptao"), *VARIANTS))
    if not issubclass(METHODS[method if method in METHODS else "fedpeptao"], FactorMethod) or TUNINGS[kind].has_factors
    if method not in ROBUST or method == ROBUST[row % len(ROBUST)]
    if (row + column) // 2 % 2 or method in ALWAYS or "FEDHPC_TEST_ALL" in os.environ
]
COMBINATIONS += [
    ("text", kind, method) for kind in TUNINGS if kind != "bitfit" for method in ("fedavg", "drift_corrected")
]
COMBINATIONS += [("text", "lora", "fibecfed"), ("encoder", "lora", "keep"), ("decoder", "lora", "ranks")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small world for each kind of backbone and for text, and a source prompt for ATTEMPT."""
    folder = tmp_path_factory.mktemp("combinations")
    for backbone in ("encoder", "decoder", "text"):
        (folder / backbone).mkdir()
        more = {"kind": "decoder", "task": "generation"} if backbone == "text" else {"kind": backbone}
        write_world(folder / backbone, num_layers=2, num_train=48, num_validation=12, **more)
    save_file({"prompt_embeddings": torch.randn(2, 32)}, folder / "adapter_model.safetensors")
    return folder


def write_config(folder, where, backbone, kind, method):
    """A configuration file of three rounds of two devices, half of the layers exchanged where there are some."""
    values = yaml.safe_load((folder / backbone / "config.yaml").read_text())
    name = f"{where}-{backbone}-{kind}-{method}"
    values |= {
        "run_dir": str(folder / name),
        "federation": {"num_devices": 4, "sample_rate": 0.5, "rounds": 3, "partition": "iid"},
        "tuning": {**values["tuning"], "kind": kind, "num_tokens": 2, "rank": 2, "bottleneck": 3},
        "selection": {"strategy": "all"} if not TUNINGS[kind].has_layers else {"strategy": "first", "ratio": 0.5},
        "server": {"variant": method} if method in VARIANTS else {"method": method},
        "checkpoint": {"every": 3},
        "evaluate": {"every": 3},
    }
    if TUNINGS[kind].has_layers and method in ("fedavgm", "ditto"):
        values["selection"]["local_layers"] = "frozen"
    values["model"]["prepack_weights"] = (backbone, method) == ("text", "drift_corrected") and kind != "full"
    values["device"] |= {"optimizer": "sgd" if method == "mime" else "adamw"}
    if method == "fibecfed":
        values |= {"server": {"method": "fedavg"}, "selection": {"strategy": "sensitivity", "ratio": 0.5}}
        values |= {"curriculum": {"order": "fisher"}, "sparse": {"fraction": 0.5}}
    values["server"] |= {"trimmed": 0.0, "bad": 0} if method in ("trimmed_mean", "krum") else {}
    if method == "krum":
        values["federation"]["sample_rate"] = 0.75  # it needs three uploads
    if method == "keep":
        values |= {"server": {"method": "fedavg"}, "exchange": {"keep": ["lora_B.*"]}}
    if method == "ranks":
        values |= {"server": {"method": "flexlora"}, "tuning": {**values["tuning"], "ranks": [1, 2]}}
    if method == "fedbuff":
        values |= {"trace": False, "simulation": {"step_seconds": 1.0, "slowness": 1.0}}
    if kind == "attempt":
        values["tuning"]["sources"] = [str(folder)]
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def together(folder):
    """All combinations on three ranks, in one start of them."""
    paths = {combination: write_config(folder, "together", *combination) for combination in COMBINATIONS}
    done = mpirun(3, Path(__file__).with_name("run_each.py"), *paths.values(), timeout_s=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return paths


def outcome(config):
    """All tensors of the last checkpoint and of the traces; what the metrics say."""
    facts = [[record.get(key) for key in FACTS] for record in metrics(config)]
    return final_tensors(config), traces(config) if (run_dir(config) / "traces").exists() else {}, facts


@pytest.mark.parametrize("combination", COMBINATIONS, ids="-".join)
def test_ranks_and_interruptions_leave_no_trace(folder, together, combination):
    alone = write_config(folder, "alone", *combination)
    assert run(alone, STOP_AT_STEP) == Op.SUSPEND
    assert run(alone) == Op.FINISH
    assert outcome(together[combination]) == outcome(alone)
    assert len(outcome(alone)[1]) == (0 if combination[2] == "fedbuff" else 3)
