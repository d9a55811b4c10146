"""One process, the whole job."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter

import h5py
import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import save_file
from tiny import KEY_WIDTH, NUM_LAYERS, NUM_TOKENS, arrays, final_prompts, metrics, run_dir, server_file

from fedhpc.checkpoint.files import CONTROL, LOCAL, Position, device_of, read_checksums
from fedhpc.checkpoint.store import Checkpoints
from fedhpc.commands.report import read_run
from fedhpc.config import Config
from fedhpc.config.file import load_config
from fedhpc.device import evaluation
from fedhpc.device.worker import NO_RECORDS, Worker
from fedhpc.errors import EXIT_STOPPED, EXIT_USER_ERROR
from fedhpc.evaluate.metrics import Metric
from fedhpc.evaluate.predictions import evaluation_examples
from fedhpc.job.run_files import RunFiles
from fedhpc.methods.fedpeptao import RELEASED_STEPS
from fedhpc.registry import METRICS
from fedhpc.server import job, saving


def device_files(config, kind, after_round=None):
    """Device -> its file of control/ or local/ that belongs to a checkpoint, the newest by default."""
    checkpoints = Checkpoints(run_dir(config))
    position = checkpoints.positions()[0] if after_round is None else Position(after_round)
    names = (name for name in checkpoints.device_files(position) if name.startswith(f"../{kind}/"))
    return {device_of(name): checkpoints.path(position) / name for name in names}


def steps_taken(config):
    """Device -> what its file says."""
    found = {}
    for number, path in device_files(config, LOCAL).items():
        with h5py.File(path) as file:
            found[number] = file.attrs["steps_taken"]
    return found


def test_a_run_leaves_the_promised_files_and_learns(fedhpc, run_config):
    config = run_config(federation__rounds=10, selection__strategy="all", device__learning_rate=0.1)
    status, out, _ = fedhpc("run", config)
    assert status == 0
    assert out.count("round ") == 10
    folder = run_dir(config)
    assert {path.name for path in folder.iterdir()} == {
        "config.yaml",
        "metrics.jsonl",
        "log.txt",
        "checkpoints",
        "traces",
    }
    assert (folder / "checkpoints/LATEST").read_text() == "round_000010\n"
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {
        "LATEST",
        "control",
        "local",
        "round_000009",
        "round_000010",
    }
    # Where all layers are exchanged and moments are reset, a device keeps nothing.
    assert set(read_checksums(folder / "checkpoints/round_000010")) == {
        "server.h5",
        *(f"../control/{path.name}" for path in device_files(config, CONTROL).values()),
    }
    assert "rank 0/1" in (folder / "log.txt").read_text()
    records = metrics(config)
    assert [record["round"] for record in records] == list(range(10))
    for record in records:
        assert len(record["devices"]) == 6
        assert record["bytes_down"] == record["bytes_up"] == 0  # nothing crosses between ranks of one process
        assert record["bytes"] == 6 * 2 * 4 * NUM_LAYERS * 2 * NUM_TOKENS * KEY_WIDTH  # six devices, down and up
        assert {"broadcast", "local", "gather", "server", "evaluate", "checkpoint", "idle"} <= set(record["seconds"])
    assert records[-1]["loss"] < 0.6 * records[0]["loss"]
    majority = 18 / 48  # `mixed` in the validation split
    assert records[-1]["accuracy"] > majority + 0.2


def test_some_examples_are_evaluated_on_and_all_of_them_in_the_last_round(fedhpc, run_config):
    changes = {"federation__rounds": 3, "device__learning_rate": 0.3}
    whole, some = run_config("whole", **changes), run_config("some", **changes, evaluate={"every": 1, "examples": 12})
    assert [fedhpc("run", config)[0] for config in (whole, some)] == [0, 0]
    assert [record["evaluated"] for record in metrics(whole)] == [48, 48, 48]
    assert [record["evaluated"] for record in metrics(some)] == [12, 12, 48]
    assert final_prompts(some) == final_prompts(whole)
    for key in ("accuracy", "accuracy_global", "device_accuracy"):
        assert metrics(some)[-1][key] == metrics(whole)[-1][key]
    for key in ("accuracy", "accuracy_global"):  # twelfths
        assert metrics(some)[0][key] * 12 == pytest.approx(round(metrics(some)[0][key] * 12))


def test_a_checkpoint_counts_only_where_the_metrics_before_it_are_on_disk(fedhpc, run_config, monkeypatch):
    order = []
    force, commit = RunFiles.force_metrics, Checkpoints.commit

    def forcing(files):
        force(files)
        order.append(len(files.read_metrics()))

    def committing(checkpoints, position, *arguments, **named):
        order.append(f"round {position.round}")
        commit(checkpoints, position, *arguments, **named)

    monkeypatch.setattr(RunFiles, "force_metrics", forcing)
    monkeypatch.setattr(Checkpoints, "commit", committing)
    assert fedhpc("run", run_config(federation__rounds=3, checkpoint__every=2))[0] == 0
    first, two, second, three, last = order
    assert (two, three, last) == ("round 2", "round 3", 3)
    assert first >= 1  # its own line is in the checkpoint too
    assert second >= 2


def test_nothing_is_evaluated_twice(fedhpc, run_config, monkeypatch):
    predicted, results = [], evaluation.results

    def counting(*args):
        for examples, outcomes in results(*args):
            predicted.extend(examples.tolist())
            yield examples, outcomes

    monkeypatch.setattr(evaluation, "results", counting)
    config = run_config(federation__sample_rate=0.25, federation__rounds=1)
    assert fedhpc("run", config)[0] == 0
    (record,) = metrics(config)
    validation = job.load_job(load_config(config)).partition.validation
    own = [example for number in record["devices"] for example in validation[number].tolist()]
    # All with the server's prompts, and once more what the three sampled devices have, with theirs.
    assert sorted(predicted) == sorted([*range(48), *own])
    assert record["evaluated"] == 48


@pytest.mark.parametrize(
    ("labels", "count", "sizes"),
    [
        # 10, 6 and 4 of 20: shares of 5 are 2.5, 1.5 and 1; the first of equals has one more.
        ([0] * 10 + [1] * 6 + [2] * 4, 5, [3, 1, 1]),
        ([0] * 10 + [1] * 6 + [2] * 4, 7, [4, 2, 1]),  # 3.5, 2.1, 1.4
        ([0, 1, 1, 3], 4, [1, 2, 0, 1]),
        ([0, 1], 9, [1, 1]),
    ],
)
def test_the_examples_to_evaluate_on_have_the_classes_of_all(labels, count, sizes):
    labels = np.array(labels)
    chosen = evaluation_examples(labels, count, 1)
    assert np.bincount(labels[chosen], minlength=len(sizes)).tolist() == sizes
    assert np.array_equal(chosen, np.unique(chosen))
    assert np.array_equal(chosen, evaluation_examples(labels, count, 1))
    assert np.array_equal(evaluation_examples(labels, None, 1), np.arange(len(labels)))


@pytest.mark.parametrize("ratio", [0.5, 1.0])
def test_each_device_has_an_accuracy_of_its_own(fedhpc, run_config, ratio):
    # 40 devices share 48 examples for evaluation; some have none.
    config = run_config(
        selection__ratio=ratio,
        federation__num_devices=40,
        federation__rounds=2,
        evaluate__every=2,
        device__learning_rate=0.3,
    )
    assert fedhpc("run", config)[0] == 0
    first, last = metrics(config)
    assert (last["accuracy"] == last["accuracy_global"]) == (ratio == 1)
    assert "device_accuracy" not in first
    shares = [len(examples) for examples in job.load_job(load_config(config)).partition.validation]
    assert 0 in shares
    assert [accuracy is None for accuracy in last["device_accuracy"]] == [share == 0 for share in shares]
    right = [share * (accuracy or 0) for share, accuracy in zip(shares, last["device_accuracy"], strict=True)]
    assert right == pytest.approx([round(count) for count in right], abs=1e-4)
    assert sum(right) / 48 == pytest.approx(last["accuracy"], abs=1e-5)
    assert len({accuracy for accuracy in last["device_accuracy"] if accuracy is not None}) > 1


def test_frozen_layers_are_the_same_on_every_device(fedhpc, run_config):
    config = run_config(
        selection__strategy="last", selection__local_layers="frozen", federation__rounds=2, device__weight_decay=0.1
    )
    assert fedhpc("run", config)[0] == 0
    for record in metrics(config):
        assert record["accuracy"] == record["accuracy_global"]
    initial = job.load_job(load_config(config)).tuning.initial(load_config(config).seed)["prompts"]
    with h5py.File(Checkpoints(run_dir(config)).path(Position(2)) / "server.h5") as file:
        assert np.array_equal(file["unseen_local_prompts"], initial[:2])
        assert not np.array_equal(file["prompts"], initial[2:])
    assert not device_files(config, LOCAL)


def test_half_of_the_layers_are_exchanged_and_the_others_stay_on_the_device(fedhpc, run_config):
    config = run_config()
    assert fedhpc("run", config)[0] == 0
    seen = {device for record in metrics(config) for device in record["devices"]}
    shape = (2, 2, tiny.NUM_TOKENS, tiny.KEY_WIDTH)
    with h5py.File(Checkpoints(run_dir(config)).path(Position(3)) / "server.h5") as file:
        layers = file["prompts"].attrs["layers"].tolist()
        scores = file["selection/scores"][()]
        assert file["prompts"].shape == shape
        assert set(file["control/device_ids"][()]) == seen
    assert layers == sorted(np.argsort(-scores, kind="stable")[:2].tolist())
    for kind, name in ((CONTROL, "control"), (LOCAL, "local_prompts")):
        own = []
        files = device_files(config, kind)
        assert set(files) == seen
        for path in files.values():
            with h5py.File(path) as file:
                own.append(file[name][()])
        assert own[0].shape == shape
        assert len({array.tobytes() for array in own}) == len(seen)


def test_a_checkpoint_writes_files_only_for_the_devices_that_took_part_since_the_last_one(fedhpc, run_config):
    config = run_config(checkpoint__keep=10, federation__rounds=4)
    assert fedhpc("run", config)[0] == 0
    sampled = [set(record["devices"]) for record in metrics(config)]
    assert sampled[0] != sampled[1]
    for kind in (CONTROL, LOCAL):
        before = {}
        for done in range(1, 5):
            files = {device: path.name for device, path in device_files(config, kind, done).items()}
            assert {device for device, name in files.items() if before.get(device) != name} == sampled[done - 1]
            before = files


@pytest.mark.parametrize("method", ["fedavg", "fedpeptao"])
def test_a_resumed_run_ends_with_the_same_bits(fedhpc, run_config, method):
    changes = {"server__method": method, "device__reset_moments": False, "tuning__dropout": 0.1}
    whole, parts = run_config("whole", **changes), run_config("parts", **changes)
    assert fedhpc("run", whole)[0] == 0
    assert fedhpc("run", parts, "--set", "federation.rounds=1")[0] == 0
    status, _, err = fedhpc("run", parts, "--resume", "require")
    assert status == 0
    assert "resuming after round 1 of 3" in err
    assert final_prompts(whole) == final_prompts(parts)
    for kind in (CONTROL, LOCAL):
        ours, theirs = (
            {device: arrays(path) for device, path in device_files(config, kind).items()} for config in (parts, whole)
        )
        assert ours == theirs
        assert bool(ours) == (kind == LOCAL or method == "fedpeptao")
    assert [r["accuracy"] for r in metrics(whole)] == [r["accuracy"] for r in metrics(parts)]


@pytest.mark.parametrize(
    ("changes", "down", "up"),
    [
        ({"server__method": "fedavg"}, 1, 1),
        ({"server__method": "scaffold"}, 2, 1),  # c goes down too; c_i's change follows from the upload
        ({"server__method": "mime", "device__optimizer": "sgd"}, 2, 2),  # momentum down, a gradient up
        ({"server__method": "fedavg", "exchange__dtype": "float16"}, 1, 0.5),
    ],
)
def test_bytes_between_devices_and_server_are_those_of_the_method(fedhpc, run_config, changes, down, up):
    config = run_config(federation__rounds=1, **changes)
    assert fedhpc("run", config)[0] == 0
    exchanged = 4 * (NUM_LAYERS // 2) * 2 * NUM_TOKENS * KEY_WIDTH
    assert metrics(config)[0]["bytes"] == 6 * exchanged * (down + up)


def test_a_layer_whose_first_tokens_take_all_attention_is_not_taken_for_deaf(run_config, fedhpc):
    """The demo's kind of backbone in 16 bits: between tokens 0 and 1 its first layer has no choice."""
    config = run_config(tuning={"kind": "lora"}, model__dtype="bfloat16", federation__rounds=1)
    assert fedhpc("run", config)[0] == 0


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(fedhpc, run_config):
    configs = [run_config("a"), run_config("b"), run_config("c", seed=7)]
    assert [fedhpc("run", config)[0] for config in configs] == [0, 0, 0]
    a, b, c = map(final_prompts, configs)
    assert a == b != c


def test_an_eigengap_that_no_device_finds_exchanges_all_layers_and_is_said(fedhpc, run_config):
    """The loss of so few parameters is far from a parabola."""
    selection = {"strategy": "score", "ratio": "auto", "auto_by": "eigengap", "warmup_rounds": 1}
    status, _, err = fedhpc("run", run_config(selection=selection, federation__rounds=2))
    assert status == 0
    assert (
        len(re.findall(r"device \d+: 1\.000 \(gap [\d.e+-]+, the widest, is not above 4 Lip = [\d.e+-]+\)", err)) == 6
    )
    assert "lossless ratio 1.000 (eigengap; 1.000 to 1.000, standard deviation 0.000 over 6 devices)" in err
    assert "exchanging layers [0, 1, 2, 3]" in err


def test_an_automatic_ratio_narrows_the_exchange_after_the_warm_up(fedhpc, run_config):
    changes = {
        "selection__ratio": "auto",
        "selection__warmup_rounds": 2,
        "federation__rounds": 4,
    }
    whole, parts = run_config("whole", **changes), run_config("parts", **changes)
    status, _, err = fedhpc("run", whole)
    assert status == 0
    ratio, layers = re.search(r"lossless ratio ([\d.]+) .*: exchanging layers (\[.*\])", err).groups()
    found = [float(text) for text in re.findall(r"device \d+: ([\d.]+) \(mass above 0 [\d.]+\)", err)]
    assert float(ratio) == pytest.approx(np.mean(found), abs=0.001)  # whatever their examples
    shapes = []
    for t in range(4):
        with h5py.File(run_dir(whole) / f"traces/round_{t:06d}.h5") as file:
            shapes.append(len(file["broadcast"]))
    assert shapes[:2] == [tiny.NUM_LAYERS] * 2
    assert shapes[2] == shapes[3] == len(json.loads(layers)) == max(1, int(float(ratio) * tiny.NUM_LAYERS))
    assert shapes[2] < tiny.NUM_LAYERS
    chosen = np.isin(np.arange(tiny.NUM_LAYERS), json.loads(layers))
    before, after = (run_dir(whole) / f"traces/round_{t:06d}.h5" for t in (1, 2))
    with h5py.File(before) as warm_up, h5py.File(after) as file, h5py.File(server_file(whole)) as server:
        np.testing.assert_array_equal(file["broadcast"], warm_up["result"][chosen])
        np.testing.assert_array_equal(server["unseen_local_prompts"], warm_up["result"][~chosen])
    for rounds in (1, 2, 3, 4):
        assert fedhpc("run", parts, "--set", f"federation.rounds={rounds}")[0] == 0
    assert final_prompts(whole) == final_prompts(parts)
    steps = Counter()
    for path in (run_dir(whole) / "traces").iterdir():
        with h5py.File(path) as file:
            steps.update(dict(zip(file["device_ids"][:].tolist(), file["num_steps"][:].tolist(), strict=True)))
    for config in (whole, parts):
        assert steps_taken(config) == steps


def test_moments_kept_on_a_device_outlive_the_warm_up(fedhpc, run_config):
    config = run_config(
        selection__ratio="auto",
        selection__warmup_rounds=1,
        device__reset_moments=False,
        federation__rounds=2,
    )
    status, _, err = fedhpc("run", config)
    assert status == 0
    assert "lossless ratio" in err
    files = device_files(config, LOCAL)
    assert sorted(files) == sorted({device for record in metrics(config) for device in record["devices"]})
    assert all("optimizer/prompts.exp_avg" in arrays(path) for path in files.values())


def test_a_warm_up_that_outlasts_the_run_is_noticed(fedhpc, run_config):
    _, _, err = fedhpc("run", run_config(selection__ratio="auto", selection__warmup_rounds=10))
    assert "all layers are exchanged to the end" in err


def test_a_run_that_begins_anew_has_its_own_metrics(fedhpc, run_config):
    config = run_config()
    assert fedhpc("run", config)[0] == 0
    shutil.rmtree(run_dir(config) / "checkpoints")
    status, _, err = fedhpc("run", config, "--set", "federation.rounds=2", "--set", "device.learning_rate=0.01")
    assert status == 0
    assert "metrics.jsonl has rounds of which no checkpoint is left; they are in metrics.1.jsonl now" in err
    assert [record["round"] for record in metrics(config)] == [0, 1]
    assert len((run_dir(config) / "metrics.1.jsonl").read_text().splitlines()) == 3


def test_a_round_that_becomes_the_last_is_evaluated(fedhpc, run_config):
    config = run_config(evaluate__every=100, federation__rounds=4)
    assert fedhpc("run", config)[0] == 0
    shutil.rmtree(run_dir(config) / "checkpoints/round_000004")
    assert fedhpc("run", config, "--set", "federation.rounds=3")[0] == 0
    lines = metrics(config)
    assert [line["round"] for line in lines] == [0, 1, 2, 3, 2]
    assert lines[2]["accuracy"] is None
    assert lines[4]["accuracy"] is not None
    assert lines[4]["loss"] == lines[2]["loss"]


def test_rerunning_a_finished_run_changes_nothing(fedhpc, run_config):
    config = run_config()
    assert fedhpc("run", config)[0] == 0
    before = (run_dir(config) / "metrics.jsonl").read_text()
    assert fedhpc("run", config)[0] == 0
    assert (run_dir(config) / "metrics.jsonl").read_text() == before


def test_a_broken_newest_checkpoint_is_reported_and_the_one_before_is_used(fedhpc, run_config):
    config, whole = run_config(), run_config("whole")
    assert fedhpc("run", config)[0] == fedhpc("run", whole)[0] == 0
    path = Checkpoints(run_dir(config)).path(Position(3)) / "server.h5"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    status, _, err = fedhpc("run", config)
    assert status == 0
    assert f"{path}: is truncated or altered" in err
    assert "resuming after round 2 of 3" in err
    assert final_prompts(config) == final_prompts(whole)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of so many bytes at this path."""
    path = tmp_path / "disk"
    path.mkdir()

    def mount(size):
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            pytest.skip(f"no command mount: {error}")
        if done.returncode:
            pytest.skip(f"cannot mount a small file system: {done.stderr.strip()}")
        return path

    yield mount
    if os.path.ismount(path):
        subprocess.run(["umount", "--lazy", path], check=True)


def test_a_full_disk_ends_the_run_and_with_space_made_it_goes_on_to_the_same_bits(fedhpc, run_config, small_disk):
    changes = {"federation__rounds": 6, "checkpoint__keep": 100, "trace": False}
    undisturbed = run_config("undisturbed", **changes)
    assert fedhpc("run", undisturbed)[0] == 0
    needed = sum(512 * path.stat().st_blocks for path in run_dir(undisturbed).rglob("*"))
    disk = small_disk(3 * needed)
    config = run_config(**changes | {"run_dir": str(disk / "run")})
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(3 * needed - needed // 2))

    run = subprocess.run(
        [sys.executable, "-m", "fedhpc", "run", config],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode not in (0, EXIT_USER_ERROR, EXIT_STOPPED)
    (message,) = (line for line in run.stderr.splitlines() if "CRITICAL" in line)
    assert "No space left on device" in message
    assert str(disk / "run" / "checkpoints") in message
    assert "rank 0/1" in message
    before = Checkpoints(disk / "run").positions()[0]
    assert Position(0) < before < Position(6)

    ballast.unlink()
    status, _, err = fedhpc("run", config, "--resume", "require")
    assert status == 0
    assert "checkpoint not used" not in err
    assert f"resuming after round {before.round} of 6" in err
    assert final_prompts(config) == final_prompts(undisturbed)
    assert [record["accuracy"] for record in RunFiles(disk / "run").read_metrics()] == [
        r["accuracy"] for r in metrics(undisturbed)
    ]


def test_a_fault_leaves_no_thread_that_writes(fedhpc, run_config, monkeypatch):
    """The interpreter's end would kill it within h5py, and then wait for h5py's lock for ever."""
    writers, encoding = [], saving.server_file

    def slow(*arguments):
        writers.append(threading.current_thread())
        time.sleep(1)
        return encoding(*arguments)

    def failing(self, *arguments):
        raise OSError("no more")

    monkeypatch.setattr(saving, "server_file", slow)
    config = run_config(federation__rounds=2, device__pack=1)
    monkeypatch.setattr(Worker, "evaluate", lambda *_: failing(None) if writers else NO_RECORDS)
    monkeypatch.setattr(Worker, "save", lambda *_: NO_RECORDS)
    with pytest.raises(SystemExit):
        fedhpc("run", config, "--set", "evaluate.every=2")
    assert len(writers) == 1
    assert not writers[0].is_alive()


@pytest.mark.parametrize("method", ["fedpeptao", "mime"])  # the momentum of mime grows tenfold from round 0 on
def test_a_run_that_learns_is_not_warned_about(fedhpc, run_config, method):
    more = {"device__optimizer": "sgd"} if method == "mime" else {}
    config = run_config(federation__rounds=10, server__method=method, **more)
    status, _, err = fedhpc("run", config)
    assert status == 0
    assert "grows without bound" not in err


def test_layers_that_all_score_alike_are_not_chosen_silently(fedhpc, run_config):
    """One example a device: its similarity to itself is 1 in every layer, and so is 1 / 1."""
    config = run_config(federation={"num_devices": 240, "sample_rate": 0.01, "rounds": 1, "partition": "iid"})
    status, _, err = fedhpc("run", config)
    assert status == 0
    assert "with federation.num_devices: 240 none has two: all layers score alike" in err
    assert "does not tell layers [0, 1, 2, 3] apart, their score is 1; those with the lower index" in err
    assert "none has two" in fedhpc("plan", config, "--ranks", 2)[1]
    _, _, err = fedhpc("run", run_config("other"))
    assert "alike" not in err
    assert "apart" not in err


def test_a_run_that_grows_without_bound_is_warned_about(fedhpc, run_config):
    config = run_config(
        server__variant="paper", device__learning_rate=0.0005, federation__rounds=10, selection__strategy="all"
    )
    _, _, err = fedhpc("run", config, "--set", "server.learning_rate=1.0", "--set", "evaluate.every=20")
    assert "known to diverge" in err
    assert err.count("the update norm grows without bound") == 1


def test_a_run_does_not_go_on_as_the_released_code_where_that_name_meant_the_paper(fedhpc, run_config, monkeypatch):
    config = run_config(server__variant="released", device__learning_rate=0.04, federation__rounds=1)
    identity = Config.identity
    monkeypatch.setattr(
        Config, "identity", lambda self: {k: v for k, v in identity(self).items() if k != RELEASED_STEPS}
    )
    assert fedhpc("run", config)[0] == 0
    monkeypatch.undo()
    status, _, err = fedhpc("run", config, "--set", "federation.rounds=2")
    assert status == 2
    assert "server.variant: released computed what server.variant: paper computes now; choose another run_dir" in err
    # What it has tuned is as good as before, and its numbers are those of `paper`.
    assert fedhpc("predict", run_dir(config), "--text", "the place was dull")[0] == 0
    assert read_run(run_dir(config)).config["server.variant"] == "paper"
    experiment = config.with_name("experiment.yaml")
    values = {"base": str(config), "out": str(run_dir(config).parent), "grid": {"cell": {"run": {}}}}
    experiment.write_text(json.dumps(values))
    run_dir(config).rename(run_dir(config).with_name("cell=run"))
    status, _, err = fedhpc("sweep", experiment, "--dry-run")
    assert status == 2
    assert "computed what server.variant: paper computes now" in err


def test_a_run_does_not_go_on_with_other_source_prompts(fedhpc, run_config, tmp_path):
    path = tmp_path / "adapter_model.safetensors"
    shape = (tiny.NUM_TOKENS, 32)
    save_file({"prompt_embeddings": torch.zeros(shape)}, path)
    tuning = {"kind": "attempt", "num_tokens": tiny.NUM_TOKENS, "sources": [str(tmp_path)]}
    config = run_config(tuning=tuning, selection={}, federation__rounds=1)
    assert fedhpc("run", config)[0] == 0
    save_file({"prompt_embeddings": torch.ones(shape)}, path)
    status, _, err = fedhpc("run", config, "--set", "federation.rounds=2")
    assert status == 2
    assert "tuning.sources sha256" in err


def test_a_run_goes_on_where_its_model_lies_now_but_not_with_another(fedhpc, run_config, tmp_path):
    folder = tiny.write_backbone(tmp_path / "backbone")
    config = run_config(model__name=str(folder), federation__rounds=1)
    assert fedhpc("run", config)[0] == 0
    folder = folder.rename(tmp_path / "moved")
    more = ["--set", f"model.name={folder}", "--set", "federation.rounds=2"]
    assert fedhpc("run", config, *more)[0] == 0
    tiny.write_backbone(folder, seed=1)
    status, _, err = fedhpc("run", config, *more, "--set", "federation.rounds=3")
    assert status == 2
    assert "backbone: weights: content" in err
    status, _, err = fedhpc("predict", run_dir(config), "--text", "the place was dull")
    assert status == 2
    assert "backbone: weights: content" in err


class TestBadInput:
    """One clear message, exit 2, no traceback, nothing trained, nothing lost."""

    @pytest.fixture
    def refused(self, fedhpc, run_config):
        def check(*words, arguments=(), config=None, **changes):
            config = config or run_config("refused", **changes)
            status, out, err = fedhpc("run", config, *arguments)
            assert status == 2
            assert "Traceback" not in err
            assert "round 1" not in out
            message = err[err.index("fedhpc: error: ") :]
            for word in words:
                assert str(word) in message
            return message

        return check

    def test_misspelt_key_names_the_nearest(self, refused):
        refused("device.lerning_rate", "did you mean device.learning_rate?", device__lerning_rate=0.1)

    def test_all_problems_at_once(self, refused):
        refused(
            "3 problem(s)",
            "device.epochs",
            "'two'",
            "federation.sample_rate",
            "server.methd",
            device__epochs="two",
            federation__sample_rate=0.0,
            server__methd="fedavg",
        )

    def test_missing_model(self, refused, tmp_path):
        refused("model.name", tmp_path / "nowhere", "no folder", model__name=str(tmp_path / "nowhere"))

    def test_missing_data(self, refused, tmp_path):
        refused(tmp_path / "nowhere", data__path=str(tmp_path / "nowhere"))

    def test_another_tokenizer(self, refused, world, tmp_path):
        other = tiny.write_backbone(tmp_path / "other")
        vocabulary = other / "tokenizer.json"
        vocabulary.write_text(vocabulary.read_text().replace("lovely", "lovelier"))
        refused("tokenizer", other, "fedhpc prepare", model__name=str(other))

    def test_more_devices_than_examples(self, refused):
        refused("num_devices", "1000", "240", federation__num_devices=1000)

    def test_shards_that_leave_a_device_empty(self, refused):
        refused("shards", "num_devices", federation__partition="shards", federation__num_devices=200)

    def test_a_ratio_that_selects_no_layer(self, refused):
        refused("selection.ratio: 0.1 of 4 layers selects no layer", "0.25", selection__ratio=0.1)

    def test_another_task_or_head(self, refused):
        refused("data.task: rte", "moods", data__task="rte")
        refused("tuning.head: linear", "verbalizer", tuning__head="linear")

    def test_too_many_positions(self, refused):
        refused("tuning.num_tokens", "64 positions", tuning__num_tokens=60)

    def test_run_dir_not_writable(self, refused, tmp_path):
        (tmp_path / "file").write_text("")
        refused("run_dir", "not writable", run_dir=str(tmp_path / "file" / "run"))

    def test_only_one_class(self, refused, world, tmp_path):
        source = tiny.write_source(tmp_path / "one")
        lines = (source / "train.tsv").read_text().splitlines()
        (source / "train.tsv").write_text("\n".join([lines[0], *(x for x in lines if x.endswith("\tbad"))]) + "\n")
        arguments = ["--task", source / "task.yaml", "--source", source, "--model", world.parent / "backbone"]
        prepare = tiny.load_script("prepare")
        assert prepare.main([*map(str, arguments), "--out", str(tmp_path / "prepared")]) == 0
        refused("prepared", "same label", data__path=str(tmp_path / "prepared"))

    @pytest.mark.parametrize("damage", ["cut", "altered"])
    def test_damaged_data(self, refused, world, tmp_path, damage):
        prepared = shutil.copytree(world.parent / "prepared", tmp_path / "prepared")
        path = prepared / "train.tokens.npy"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content[:-4] if damage == "cut" else content)
        refused("train.tokens.npy", damage, data__path=str(prepared))

    def test_resume_with_another_configuration(self, refused, fedhpc, run_config):
        config = run_config()
        assert fedhpc("run", config)[0] == 0
        message = refused("device.epochs: 1 in the checkpoint, 2 now", config=run_config(device__epochs=2, seed=1))
        assert "seed: 42 in the checkpoint, 1 now" in message

    def test_resume_with_other_shapes(self, refused, fedhpc, run_config):
        assert fedhpc("run", run_config())[0] == 0
        refused("tuning.num_tokens: 3 in the checkpoint, 4 now", config=run_config(tuning__num_tokens=4))

    def test_resume_with_data_of_other_class_words(self, refused, fedhpc, run_config, world, tmp_path):
        assert fedhpc("run", run_config())[0] == 0
        source = shutil.copytree(world.parent / "source", tmp_path / "source")
        task = (source / "task.yaml").read_text()
        (source / "task.yaml").write_text(
            task.replace("great", "WORD").replace("terrible", "great").replace("WORD", "terrible")
        )
        arguments = ["--task", source / "task.yaml", "--source", source, "--model", world.parent / "backbone"]
        prepare = tiny.load_script("prepare")
        assert prepare.main([*map(str, arguments), "--out", str(tmp_path / "prepared")]) == 0
        refused("data:", config=run_config(data__path=str(tmp_path / "prepared")))

    @pytest.mark.parametrize("change", [{"word_ids": [[10], [9], [11]]}, {"splits": {}}, {"pad_id": -5}])
    def test_a_description_changed_by_hand(self, refused, world, tmp_path, change):
        prepared = shutil.copytree(world.parent / "prepared", tmp_path / "prepared")
        path = prepared / "description.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        refused(path, "altered", data__path=str(prepared))

    @pytest.mark.parametrize("name", ["checkpoints", "log.txt"])
    def test_something_else_in_the_place_of_a_run_file(self, refused, run_config, name):
        config = run_config()
        run_dir(config).mkdir()
        path = run_dir(config) / name
        path.mkdir() if name == "log.txt" else path.write_text("")
        refused(path, "in the way", config=config)

    def test_resume_required_or_forbidden(self, refused, fedhpc, run_config):
        config = run_config()
        refused("--resume require", "no checkpoint", config=config, arguments=["--resume", "require"])
        assert fedhpc("run", config)[0] == 0
        refused("--resume never", config=config, arguments=["--resume", "never"])

    def test_no_whole_checkpoint(self, refused, fedhpc, run_config):
        config = run_config(federation__rounds=2)
        assert fedhpc("run", config)[0] == 0
        checkpoints = Checkpoints(run_dir(config))
        paths = [checkpoints.path(position) / "server.h5" for position in checkpoints.positions()]
        for damaged in (paths[0].read_bytes()[:-100], b"", b"something else"):
            for path in paths:
                path.write_bytes(damaged)
            refused("no checkpoint is whole", "server.h5", config=config)
        for path in paths:
            path.unlink()
        refused("no checkpoint is whole", "server.h5", config=config)

    def test_more_than_the_file_can_say(self, refused, tmp_path):
        for content in ("- a list", "run_dir: [", "base: nowhere.yaml"):
            path = tmp_path / "odd.yaml"
            path.write_text(content)
            refused(tmp_path, config=path)
        refused("nowhere.yaml", config=tmp_path / "nowhere.yaml")


def test_a_list_of_layers_is_exchanged_whatever_the_ratio(fedhpc, run_config):
    layers = {"strategy": "explicit", "layers": [1], "ratio": "auto"}
    config = run_config(selection=layers, federation__rounds=1)
    assert fedhpc("run", config)[0] == 0
    assert "exchanging layers [1]," in (run_dir(config) / "log.txt").read_text()


def test_packs_that_leave_ranks_without_work_are_noticed(run_config, monkeypatch):
    said = []
    monkeypatch.setattr(job.log, "warning", lambda text, *values: said.append(text % values))
    loaded = job.load_job(load_config(run_config(device__pack=3)))
    job.log_notices(loaded, 2)
    assert said == []
    job.log_notices(loaded, 5)
    assert said == ["device.pack: 3 makes 2 pack(s) of a round's 6 devices: 3 of 5 device ranks have nothing to train"]


def test_kernels_of_a_few_shapes_are_kept_unless_the_user_says_how_many(fedhpc, run_config, monkeypatch):
    """oneDNN's own 1024 would take hundreds of MB in bfloat16 or with prepacked weights."""
    for given, kept in ((None, "32"), ("7", "7")):
        monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
        if given:
            monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", given)
        assert fedhpc("run", run_config(f"run {given}", federation__rounds=1))[0] == 0
        assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == kept


def test_a_plug_ins_score_does_not_take_the_place_of_another_number(fedhpc, run_config, monkeypatch):
    class Losses(Metric):
        def scores(self, counts, accuracy):
            return {"errors": 1 - accuracy, "loss": 1 - accuracy}

    monkeypatch.setitem(METRICS._parts, "accuracy", Losses)
    config = run_config()
    status, _, err = fedhpc("run", config)
    assert status == EXIT_USER_ERROR
    assert "metric 'accuracy': its score loss needs another name" in err
    assert not (run_dir(config) / "metrics.jsonl").exists()
