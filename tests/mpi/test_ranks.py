"""Real MPI ranks: the same bits on any number of them, counted bytes, recomputable traces, faults that end everyone."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import tiny
import torch
from launch import MPIRUN, mpirun
from run_each import run
from tiny import final_prompts, metrics, run_dir

from fedhpc.checkpoint.files import Position, verify
from fedhpc.checkpoint.store import Checkpoints
from fedhpc.commands import cli
from fedhpc.commands.trained import load_trained
from fedhpc.exchange.messages import Op
from fedhpc.model.backbone import Backbone
from fedhpc.tuning.base import as_parameters

pytestmark = pytest.mark.skipif(MPIRUN is None, reason="no mpirun beside this Python or on PATH")

HERE = Path(__file__).parent
HEADER_BYTES, COMMAND_BYTES = 64, 72
FEW = 6
"""Devices where there are more ranks, which are quicker to start when they are few, too."""


@pytest.fixture(scope="module")
def serial(world, tmp_path_factory):
    """The run of one process that every other must equal."""
    config = tiny.write_config(world, tmp_path_factory.mktemp("serial"), "run", federation__num_devices=FEW)
    assert cli.main(["run", str(config)]) == 0
    return config


@pytest.fixture(scope="module")
def nine(world, tmp_path_factory):
    """A traced run on nine ranks, two of them without a device."""
    config = tiny.write_config(world, tmp_path_factory.mktemp("nine"), "run", federation__num_devices=FEW)
    done = mpirun(9, "-m", "fedhpc", "run", config)
    assert done.returncode == 0, done.stderr
    return config, done


MOVING = {
    "packs; moments, Fisher information and control variates kept": {
        "device__pack": 2,
        "device__reset_moments": False,
        "sparse": {"fraction": 0.5},
        "server__method": "scaffold",
        "federation__rounds": 5,
    },
    "layers that begin to be kept": {
        "selection__ratio": "auto",
        "selection__warmup_rounds": 3,
        "selection__auto_by": "density",
        "curriculum": {"order": "fisher"},
        "federation__rounds": 5,
        "checkpoint__every": 4,
    },
    "sums": {"exchange__mode": "reduce", "trace": False, "federation__rounds": 5},
    "masked sums": {
        "exchange__mode": "secure",
        "trace": False,
        "federation__rounds": 3,
        "simulation": {"drop_out": 0.15},
        "federation__sample_rate": 1.0,
    },
    "private sums": {
        "trace": False,
        "federation__rounds": 3,
        "server": {"weights": "uniform"},
        "exchange": {"mode": "reduce"},
        "selection__strategy": "last",
        "simulation": {"drop_out": 0.3},
        "privacy": {"clip": 2.0, "noise": 1.0, "quantile": 0.5},
    },
    "absent devices": {"simulation": {"drop_out": 0.4}, "device__pack": 2, "federation__rounds": 5},
    "16 bits": {"exchange__dtype": "bfloat16", "device__pack": 2, "federation__rounds": 5},
}
ON_FIVE = {
    **{setting: {"evaluate__every": 1, **changes} for setting, changes in MOVING.items()},
    "few devices": {"federation__num_devices": FEW},
    "every layer": {"selection__ratio": 1.0, "federation__rounds": 1},
}


@pytest.fixture(scope="module")
def five(world, tmp_path_factory):
    """Runs on five ranks in one start, by setting, and the batches that were measured for a curriculum meanwhile."""
    folder = tmp_path_factory.mktemp("five")
    configs = {
        setting: tiny.write_config(world, folder, f"run{number}", **changes)
        for number, (setting, changes) in enumerate(ON_FIVE.items())
    }
    done = mpirun(5, HERE / "note_traces.py", folder, *configs.values())
    assert done.returncode == 0, done.stderr
    return configs, [line for file in folder.glob("*.traces") for line in file.read_text().splitlines()]


def test_any_number_of_ranks_gives_the_same_bits(serial, five, nine):
    for config in (five[0]["few devices"], nine[0]):
        assert final_prompts(config) == final_prompts(serial)
        for ours, theirs in zip(metrics(config), metrics(serial), strict=True):
            for key in ("loss", "accuracy", "accuracy_global", "device_accuracy", "devices", "steps", "update_norm"):
                assert ours[key] == theirs[key]


def test_a_device_that_moves_is_not_measured_again(five):
    measured = five[1]
    assert measured
    assert len(measured) == len(set(measured))


@pytest.mark.parametrize("setting", MOVING)
def test_what_devices_keep_moves_with_them(run_config, five, setting):
    together = five[0][setting]
    alone = run_config("alone", **ON_FIVE[setting])
    assert cli.main(["run", str(alone)]) == 0
    assert final_prompts(together) == final_prompts(alone)
    for ours, theirs in zip(metrics(together), metrics(alone), strict=True):
        # Accuracy is personalised: every device with the prompts that it keeps to itself.
        for key in ("loss", "accuracy", "device_accuracy", "clip", "short_changes"):
            assert ours.get(key) == theirs.get(key)
    checkpoints = Checkpoints(run_dir(together))
    for position in checkpoints.positions():
        verify(checkpoints.path(position))


def test_a_private_round_goes_on_after_a_stop_with_the_clip_it_had(run_config):
    through, stopped = (run_config(name, **ON_FIVE["private sums"]) for name in ("through", "stopped"))
    assert run(through) == Op.FINISH
    assert run(stopped, stop_at_step=20) == Op.SUSPEND  # in the second round
    assert len(metrics(stopped)) == 1
    assert run(stopped) == Op.FINISH
    assert len({record["clip"] for record in metrics(stopped)}) > 1
    assert tiny.final_tensors(stopped) == tiny.final_tensors(through)


def test_idle_ranks_are_noticed_not_refused(nine):
    _, done = nine
    assert "2 ranks have no device" in done.stderr
    assert "rank 0/9" in done.stderr
    assert [line.split()[1] for line in done.stdout.splitlines()] == ["1/3", "2/3", "3/3"]


def test_bytes_are_those_of_the_selected_layers(five, nine):
    for config, num_workers, num_layers in ((nine[0], 8, 2), (five[0]["every layer"], 4, 4)):
        prompts = 4 * num_layers * 2 * tiny.NUM_TOKENS * tiny.KEY_WIDTH
        for record in metrics(config):
            assert record["bytes_up"] == len(record["devices"]) * (prompts + HEADER_BYTES)
            assert record["bytes_down"] == num_workers * (prompts + COMMAND_BYTES + 12 * len(record["devices"]))


def test_uploads_of_16_bits_are_half_as_long_and_sums_come_once(five):
    floats = 2 * 2 * tiny.NUM_TOKENS * tiny.KEY_WIDTH
    for setting, payload, once in (("16 bits", 2 * floats, 0), ("sums", 0, 2 * 8 * floats)):
        for record in metrics(five[0][setting]):
            assert record["bytes_up"] == len(record["devices"]) * (payload + HEADER_BYTES) + once


def test_what_nine_ranks_have_tuned_is_an_adapter_for_plain_peft(nine, tmp_path):
    trained = load_trained(str(run_dir(nine[0])))
    assert cli.main(["export", str(run_dir(nine[0])), "--out", str(tmp_path / "adapter")]) == 0
    config, data = trained.job.config, trained.job.data
    batch = data.split("validation").batch(range(20))
    backbone = Backbone(config.model, config.tuning, data.description, torch.device("cpu"))
    with torch.no_grad():
        ours = trained.job.tuning.forward(backbone, [as_parameters(trained.tensors, torch.device("cpu"))], batch)
    texts = [ids[mask].tolist() for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)]
    words = [word for (word,) in data.description.word_ids]
    call = [sys.executable, HERE / "plain_peft.py", config.model.name, tmp_path / "adapter"]
    done = subprocess.run(
        call, input=json.dumps([texts, words]), capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert np.allclose(json.loads(done.stdout), ours.numpy(), rtol=0, atol=1e-4)


def recompute(trace, state, *, beta, server_learning_rate, num_devices):
    """One drift_corrected step in plain NumPy from a trace file."""
    eta = trace.attrs["device_learning_rate"]
    ids, n, k = trace["device_ids"][()], trace["num_examples"][()], trace["num_steps"][()]
    p, uploads = trace["broadcast"][()].astype(np.float64), trace["uploads"][()].astype(np.float64)
    weights = n / n.sum()
    d = (p - uploads) / (k * eta)[:, None, None, None, None]
    c_i = np.stack([state["c_i"].get(i, np.zeros_like(p)) for i in ids.tolist()])
    m = (weights[:, None, None, None, None] * (beta * state["m"] + (1 - beta) * (d - c_i + state["c"]))).sum(axis=0)
    t = state["t"] + 1
    result = p - server_learning_rate * (weights @ k) * eta * m / (1 - beta**t)
    c = state["c"] + (d - c_i).sum(axis=0) / num_devices
    return result, {"t": t, "m": m, "c": c, "c_i": {**state["c_i"], **dict(zip(ids.tolist(), d, strict=True))}}


def test_a_trace_can_be_recomputed_from_outside(nine):
    config, _ = nine
    folder = run_dir(config)
    state = {"t": 0, "m": 0.0, "c": 0.0, "c_i": {}}
    previous = None
    for t in range(3):
        with h5py.File(folder / f"traces/round_{t:06d}.h5") as trace:
            assert previous is None or np.array_equal(trace["broadcast"][()], previous)
            result, state = recompute(trace, state, beta=0.5, server_learning_rate=1.5, num_devices=FEW)
            previous = trace["result"][()]
            assert np.abs(previous - result).max() <= 1e-6 * np.abs(result).max()


def test_a_rank_that_raises_ends_all_of_them(run_config):
    config = run_config(federation__sample_rate=1.0)
    done = mpirun(5, HERE / "raise_in_round.py", "run", config)
    ended = time.time()
    assert done.returncode not in (0, 2)
    folder = run_dir(config)
    log = (folder / "log.txt").read_text()
    for text in (done.stderr, log):
        assert re.search(r"CRITICAL rank 3/5 \S+: RuntimeError: the cosmic ray", text)
        assert "Traceback" in text
        assert "raise_in_round.py" in text
    raised = time.mktime(time.strptime(re.search(r"(\S+ \S+),\d+ CRITICAL", log)[1], "%Y-%m-%d %H:%M:%S"))
    assert ended - raised < 10 + 1  # log times are cut to the second
    # The third round begins when the first one's checkpoint is in place; the second one's is being written then.
    positions = Checkpoints(folder).positions()
    assert Position(1) in positions
    assert all(position <= Position(2) for position in positions)
    for position in positions:
        verify(Checkpoints(folder).path(position))


@pytest.mark.parametrize(("fault", "is_users"), [("restore", True), ("vanished run directory", False)])
def test_no_rank_waits_for_one_that_is_gone(run_config, fault, is_users):
    """Neither when a rank's own checkpoint file is the fault, nor when the log that would tell of it is gone."""
    config = run_config()
    assert cli.main(["run", str(config), "--set", "federation.rounds=1"]) == 0
    done = mpirun(3, HERE / "fault.py", fault, "run", config, timeout_s=90)
    assert (done.returncode == 2) == is_users
    assert done.returncode != 0
    assert "rank 2/3" in done.stderr
    assert ("Traceback" in done.stderr) != is_users


def test_processes_that_do_not_find_each_other_are_refused(run_config, monkeypatch, capfd):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    assert cli.main(["run", str(run_config())]) == 2
    assert "started 4 processes (OMPI_COMM_WORLD_SIZE), but MPI sees 1" in capfd.readouterr().err


def test_bad_input_is_told_once(run_config):
    done = mpirun(3, "-m", "fedhpc", "run", run_config(device__epochs=0))
    assert done.returncode == 2
    assert done.stderr.count("fedhpc: error:") == 1
    assert "device.epochs" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_rank_that_reads_another_configuration_is_noticed(run_config):
    done = mpirun(3, HERE / "fault.py", "another configuration", "run", run_config())
    assert done.returncode == 2
    assert done.stderr.count("rank 2 has read another configuration or other data than rank 0") == 1


def test_an_upload_leaves_while_another_rank_still_works():
    done = mpirun(3, HERE / "early_upload.py", timeout_s=60)
    assert done.returncode == 0, done.stderr
    assert "all have come" in done.stdout


def test_steps_that_take_nearly_the_whole_timeout_are_no_silence():
    done = mpirun(2, HERE / "slow_steps.py", timeout_s=60)
    assert done.returncode == 0, done.stderr
    assert "nobody was given up" in done.stdout


@pytest.mark.parametrize("far", [[1], []] if "FEDHPC_TEST_ALL" in os.environ else [[1]])
def test_exchanges_past_two_gib(far):
    """Sent; with FEDHPC_TEST_ALL=1 also in memory that is shared."""
    done = mpirun(2, HERE / "large_messages.py", *far, timeout_s=300)
    assert done.returncode == 0, done.stderr
    assert f"exchanged {64 + 4 * ((1 << 29) + 1000)}" in done.stdout


@pytest.mark.parametrize("far", [[], [1, 4], [1, 2, 3, 4]])
def test_workers_that_see_the_servers_memory_and_others_exchange_the_same(far):
    done = mpirun(5, "-m", "mpi4py", HERE / "near_and_far.py", *far, timeout_s=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"near {[rank for rank in range(1, 5) if rank not in far]}"
