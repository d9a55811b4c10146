"""Federated LoRA's relatives in whole runs: FFA-LoRA, FedSA-LoRA and others by `exchange.keep`, ranks that differ."""

import h5py
import numpy as np
import pytest
import torch
from tiny import metrics, run_dir, write_config, write_world

import fedhpc
from fedhpc.commands import cli
from fedhpc.commands.inspect import inspect_text
from fedhpc.commands.trained import load_trained
from fedhpc.device.worker import Worker
from fedhpc.exchange import LocalExchange
from fedhpc.job.stopping import StopRequest
from fedhpc.model.backbone import Backbone
from fedhpc.tuning.base import as_parameters

LORA = {"kind": "lora", "rank": 4, "head": "verbalizer"}
DEVICES = range(4)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("family"), num_layers=2, num_train=60, num_validation=24)


def run(world, folder, name, *, rounds=2, status=0, **changes):
    """So many rounds of all of four devices; the configuration."""
    federation = {"num_devices": 4, "sample_rate": 1.0, "rounds": rounds, "partition": "iid"}
    common = {
        "server": {"method": "fedavg"},
        "selection": {"strategy": "all"},
        "tuning": LORA,
        "federation": federation,
    }
    path = write_config(world, folder, name, **common | changes)
    assert cli.main(["run", str(path)]) == status
    return path


def trace(path, round_index):
    """Broadcast and uploads [m, ...] of a round by tensor, and what each upload counts, in the order of the devices."""
    with h5py.File(run_dir(path) / f"traces/round_{round_index:06d}.h5") as file:
        order = np.argsort(file["device_ids"][()])
        return (
            {name: tensor[()] for name, tensor in file["broadcast_params"].items()},
            {name: tensor[()][order] for name, tensor in file["uploads_params"].items()},
            file["counts"][()][order] / file["counts"][()].sum(),
        )


def tensors(path, device=None):
    return load_trained(str(run_dir(path)), device, to_use=False).tensors


def test_ffa_lora_trains_and_sends_b_alone(world, tmp_path):
    path = run(world, tmp_path, "ffa", tuning={**LORA, "kind": "ffa_lora"})
    whole = run(world, tmp_path, "lora")
    start, uploads, weights = trace(path, 1)
    assert uploads
    assert all(name.startswith("lora_B.") for name in uploads)
    # A: rank x in, B: out x rank; LLaMA's value projection is half as wide as its query projection
    a, b = 2 * 4 * (32 + 32), 2 * 4 * (32 + 16)
    assert metrics(path)[-1]["device_bytes"] == [4 * b, 4 * b]
    assert metrics(whole)[-1]["device_bytes"] == [4 * (a + b)] * 2
    result = tensors(path)
    for name, sent in uploads.items():
        module, mean = name.removeprefix("lora_B."), np.average(sent, axis=0, weights=weights)
        assert not np.array_equal(mean, start[name])
        assert result[name] == pytest.approx(mean, abs=1e-7)
        # the product of the mean is the mean of the products
        factor = result[f"lora_A.{module}"]
        assert result[name] @ factor == pytest.approx(np.average(sent @ factor, axis=0, weights=weights), abs=1e-6)
        # A is as it was drawn, as LoRA's is before round 0
        assert np.array_equal(factor, trace(whole, 0)[0][f"lora_A.{module}"])
        assert factor.any()


def test_fedsa_lora_sends_a_and_keeps_b(world, tmp_path, capsys):
    path = run(world, tmp_path, "fedsa", exchange={"keep": ["lora_B.*"]})
    _, uploads, weights = trace(path, 1)
    assert all(name.startswith("lora_A.") for name in uploads)
    shared, own = tensors(path), [tensors(path, device) for device in DEVICES]
    for name, sent in uploads.items():
        other = name.replace("lora_A", "lora_B")
        assert shared[name] == pytest.approx(np.average(sent, axis=0, weights=weights), abs=1e-7)
        assert not shared[other].any()  # the server never saw one
        for device in own:
            assert np.array_equal(device[name], shared[name])
            assert device[other].any()
        assert not np.array_equal(own[0][other], own[1][other])
    command = ["export", str(run_dir(path)), "--out", str(tmp_path / "adapter")]
    assert cli.main(command) == 2
    assert "the devices of this run keep lora_B.* (exchange.keep)" in capsys.readouterr().err
    assert cli.main([*command, "--device", "1"]) == 0
    assert metrics(path)[-1]["accuracy"] is not None


def test_a_devices_own_tensors_go_on_from_round_to_round(world, tmp_path):
    """With no step that moves them, they are after three rounds what they were after one."""
    changes = {"exchange": {"keep": ["lora_B.*"]}, "checkpoint": {"every": 1, "keep": 9}}
    one = run(world, tmp_path, "one", rounds=1, **changes)
    two = run(world, tmp_path, "two", rounds=2, **changes)
    before, after = tensors(one, 2), tensors(two, 2)
    moved = [np.abs(after[name] - before[name]).max() for name in before if name.startswith("lora_B")]
    first = [np.abs(before[name]).max() for name in before if name.startswith("lora_B")]
    assert 0 < max(moved) < 2 * max(first)  # a second round of as many steps, not one that began at zero again
    assert metrics(two)[1]["loss"] < metrics(two)[0]["loss"]


def test_a_head_of_ones_own(world, tmp_path):
    """Deep prompts are exchanged and the head stays, in the layers that a selection leaves, too."""
    linear = write_world(tmp_path, num_layers=2, head="linear", num_train=60, num_validation=24)
    path = run(
        linear,
        tmp_path,
        "fedper",
        tuning={"kind": "prompt", "num_tokens": 3, "head": "linear"},
        exchange={"keep": ["head.*"]},
        selection={"strategy": "first", "ratio": 0.5},
    )
    own = [tensors(path, device) for device in DEVICES]
    assert not np.array_equal(own[0]["head.weight"], own[1]["head.weight"])
    assert np.array_equal(own[0]["prompts"][0], own[1]["prompts"][0])
    assert not np.array_equal(own[0]["prompts"][1], own[1]["prompts"][1])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"server": {"method": "flora"}, "tuning": {"kind": "bitfit"}}, "valid: lora"),
        ({"server": {"method": "fedex_lora"}, "exchange": {"mode": "reduce"}, "trace": False}, "exchange.mode: gather"),
        ({"exchange": {"keep": ["lora_C.*"]}}, "'lora_C.*' matches none of the tensors of tuning.kind: lora: lora_A."),
        ({"exchange": {"keep": ["lora_*"]}}, "nothing is left to exchange"),
        ({"exchange": {"keep": ["lora_A.*"]}, "tuning": {**LORA, "kind": "ffa_lora"}}, "'lora_A.*' matches none"),
        ({"exchange": {"keep": ["lora_B.*"]}, "selection": {"ratio": "auto"}}, "exchange.keep does not go together"),
        ({"tuning": {**LORA, "ranks": [2, 8]}}, "tuning.ranks: 8 is more than tuning.rank: 4"),
        ({"tuning": {**LORA, "ranks": []}}, "tuning.ranks"),
        ({"tuning": {**LORA, "ranks": {"a": 2}}}, "devices have no names here"),
        ({"server": {"method": "flexlora"}, "tuning": {**LORA, "kind": "ffa_lora"}}, "valid: lora"),
        ({"server": {"method": "flexlora"}, "exchange": {"keep": ["lora_B.*"]}}, "exchange.keep"),
    ],
)
def test_refused(world, tmp_path, capsys, changes, words):
    run(world, tmp_path, "refused", status=2, **changes)
    assert words in capsys.readouterr().err


def products(uploads, weights):
    """sum_i w_i B_i A_i by module, float64."""
    found = {}
    for name, a in uploads.items():
        if name.startswith("lora_A."):
            b = uploads[name.replace("lora_A", "lora_B")].astype(np.float64)
            found[name.removeprefix("lora_A.")] = np.einsum("m,mlor,mlri->loi", weights, b, a)
    return found


SCALING = 16 / 4


def test_fedex_lora_computes_with_the_mean_of_the_devices_weights(world, tmp_path):
    path = run(world, tmp_path, "fedex", rounds=3, server={"method": "fedex_lora"})
    before = {}
    for round_index in range(3):
        _, uploads, weights = trace(path, round_index)
        with h5py.File(run_dir(path) / f"traces/round_{round_index:06d}.h5") as file:
            result = {name: tensor[()] for name, tensor in file["result_params"].items()}
        for module, product in products(uploads, weights).items():
            mean = result[f"lora_B.{module}"].astype(np.float64) @ result[f"lora_A.{module}"]
            # what every device computed with on average, less what it computes with by the means of the factors
            before[module] = before.get(module, 0) + SCALING * (product - mean)
    state = load_trained(str(run_dir(path)))
    for module, expected in before.items():
        assert np.abs(expected).max() > 1e-3
        assert np.abs(state.job.tuning.added[module] - expected).max() < 1e-6
    size = sum(tensor[0].nbytes for tensor in uploads.values())
    assert [record["device_bytes"] for record in metrics(path)] == [[5 * size, size]] * 3  # and four devices' factors


def test_flora_adds_the_mean_product_and_begins_anew(world, tmp_path):
    path = run(world, tmp_path, "flora", server={"method": "flora"})
    expected, first = {}, trace(path, 0)[0]
    for round_index in range(2):
        start, uploads, weights = trace(path, round_index)
        assert all(np.array_equal(start[name], first[name]) for name in first)
        for module, product in products(uploads, weights).items():
            expected[module] = expected.get(module, 0) + SCALING * product
    state = load_trained(str(run_dir(path)))
    for module, weight in expected.items():
        assert np.abs(weight).max() > 1e-3
        assert np.abs(state.job.tuning.added[module] - weight).max() < 1e-6
        assert not state.tensors[f"lora_B.{module}"].any()
    assert metrics(path)[1]["loss"] < metrics(path)[0]["loss"]


def digests(path):
    """Of what a run has come to, as its log and Python say."""
    return (run_dir(path) / "log.txt").read_text().split()[-1], fedhpc.RunResult(run_dir(path)).sha256


def test_what_was_added_survives_a_stop(world, tmp_path):
    """Two rounds, then two more, are four; and prediction knows what was added."""
    server = {"method": "flora"}
    whole = run(world, tmp_path, "whole", rounds=4, server=server)
    parts = run(world, tmp_path, "parts", rounds=2, server=server)
    halfway = digests(parts)
    run(world, tmp_path, "parts", rounds=4, server=server)
    assert digests(whole) == digests(parts)
    assert not {*halfway} & {*digests(parts)}  # although the factors are those of before round 0, here as there
    # a rank that goes on after the loss of another scores layers, if at all, without it
    job = load_trained(str(run_dir(parts))).job
    assert job.tuning.added
    Worker(job.config, job.data, job.partition, None, job.tuning, LocalExchange(StopRequest())).start_over()
    assert not job.tuning.added
    checkpoint = next((run_dir(parts) / "checkpoints").iterdir())
    assert "added/self_attn.q_proj [2, 32, 32]: norm" in inspect_text(str(checkpoint))[0]
    one, other = (load_trained(str(run_dir(path))).job.tuning.added for path in (whole, parts))
    assert all(np.array_equal(one[module], other[module]) for module in one)
    assert [record["accuracy_global"] for record in metrics(whole)] == [
        record["accuracy_global"] for record in metrics(parts)
    ]


def test_dropout_leaves_out_nothing_of_what_was_added(world, tmp_path):
    """It is on what enters A, and A's changes are zero after a round of `flora`."""
    path = run(world, tmp_path, "dropout", server={"method": "flora"}, tuning={**LORA, "dropout": 0.5})
    trained = load_trained(str(run_dir(path)))
    job, place = trained.job, torch.device("cpu")
    backbone = Backbone(job.config.model, job.config.tuning, job.data.description, place)
    params, batch = as_parameters(trained.tensors, place), job.data.split("validation").batch(np.arange(4))
    plain, dropped = (job.tuning.forward(backbone, [params], batch, dropout_seeds=seeds) for seeds in (None, [1]))
    assert torch.equal(plain, dropped)


def test_ffa_loras_gradient_at_the_start_is_that_of_b(world, tmp_path):
    """Its length is that of a clipped one: A's, which is not sent, does not count."""
    device = {"batch_size": 8, "learning_rate": 1e4, "optimizer": "sgd", "max_grad_norm": 1e-3}
    path = run(world, tmp_path, "mime", tuning={**LORA, "kind": "ffa_lora"}, server={"method": "mime"}, device=device)
    with h5py.File(run_dir(path) / "traces/round_000001.h5") as file:
        gradients = np.concatenate([part[()].reshape(4, -1) for part in file["gradients_params"].values()], axis=1)
    assert np.linalg.norm(gradients, axis=1) == pytest.approx(np.full(4, 1e-3), rel=1e-3)


@pytest.mark.parametrize("method", ["fedavg", "fedprox", "scaffold"])
def test_devices_of_smaller_ranks_train_the_leading_components(world, tmp_path, method):
    path = run(world, tmp_path, "ranks", tuning={**LORA, "ranks": [1, 3]}, seed=43, server={"method": method})
    ranks = load_trained(str(run_dir(path))).job.tuning.ranks
    assert {*ranks} == {1, 3}
    for round_index in range(2):
        start, uploads, _ = trace(path, round_index)
        for name, sent in uploads.items():
            by_component = np.moveaxis(sent, 2 if "lora_A" in name else 3, 1).reshape(4, 4, -1)
            for device, rank in enumerate(ranks):
                assert not by_component[device, rank:].any()
                assert by_component[device, :rank].any(axis=1).all()
            if round_index:  # the fourth component is nobody's: zero since the first mean
                assert not np.moveaxis(start[name], 1 if "lora_A" in name else 2, 0)[3].any()


def test_ranks_by_name(tmp_path):
    named = write_world(tmp_path, num_layers=2, task="generation", num_train=60, num_validation=24)
    federation = {"num_devices": 3, "sample_rate": 1.0, "rounds": 1, "partition": "column"}
    ranks = {"bad": 1, "good": 2, "mixed": 4}
    tuning = {"kind": "lora", "rank": 4, "head": "language_model"}
    path = run(named, tmp_path, "named", tuning={**tuning, "ranks": ranks}, federation=federation, trace=False)
    job = load_trained(str(run_dir(path))).job
    assert dict(zip(job.partition.names, job.tuning.ranks, strict=True)) == ranks
    run(named, tmp_path, "odd", tuning={**tuning, "ranks": {**ranks, "odd": 1}}, federation=federation, status=2)
