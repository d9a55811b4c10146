"""Ditto's own models, in whole runs: against a device's steps by hand, and where the pull decides alone."""

import itertools
from dataclasses import replace

import h5py
import numpy as np
import pytest
from tiny import metrics, run_dir, write_config, write_world

from fedhpc.commands import cli
from fedhpc.commands.trained import load_trained
from fedhpc.device import training
from fedhpc.exchange import LocalExchange

ROUNDS = 2


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("ditto"), num_layers=2, num_train=60, num_validation=24)


def run(world, folder, name, *, rounds=ROUNDS, status=0, **changes):
    """So many rounds of all of four devices, by SGD; the configuration."""
    federation = {"num_devices": 4, "sample_rate": 1.0, "rounds": rounds, "partition": "iid"}
    device = {"epochs": 1, "batch_size": 8, "learning_rate": 0.1, "optimizer": "sgd"}
    common = {"federation": federation, "device": device, "selection": {"strategy": "all"}}
    path = write_config(world, folder, name, **common | changes)
    assert cli.main(["run", str(path)]) == status
    return path


def of_round(path, round_index):
    with h5py.File(run_dir(path) / f"traces/round_{round_index:06d}.h5") as file:
        order = np.argsort(file["device_ids"][()])
        return file["broadcast"][()], file["uploads"][()][order], file["result"][()]


def own(path, device):
    return load_trained(str(run_dir(path)), device).tensors["prompts"]


def test_the_global_model_is_fedavgs(world, tmp_path):
    ditto = run(world, tmp_path, "ditto", server={"method": "ditto", "pull": 0.5})
    fedavg = run(world, tmp_path, "fedavg", server={"method": "fedavg"})
    assert np.array_equal(of_round(ditto, 1)[2], of_round(fedavg, 1)[2])
    assert [m["device_bytes"] for m in metrics(ditto)] == [m["device_bytes"] for m in metrics(fedavg)]


def test_without_a_pull_a_device_trains_alone(world, tmp_path):
    """In round 0 its own model takes the steps of P_i; in round 1 it goes on from there, P_i from the mean."""
    one = run(world, tmp_path, "one", rounds=1, server={"method": "ditto", "pull": 0.0})
    for device, upload in enumerate(of_round(one, 0)[1]):
        assert np.array_equal(own(one, device), upload)
    two = run(world, tmp_path, "two", server={"method": "ditto", "pull": 0.0})
    for device, upload in enumerate(of_round(two, 1)[1]):
        assert not np.array_equal(own(two, device), upload)
    # a federation of this device alone takes the same steps: its P^1 is its own P_i of round 0
    first = of_round(two, 0)[1][1]
    assert 0 < np.abs(own(two, 1) - first).max() < 1


def test_the_pull_leads_to_the_global_model(world, tmp_path):
    """With a step of 1 / lambda all of the distance is gone before the gradient's part: |v - P^t| stays that small."""
    far, close = (run(world, tmp_path, f"pull{pull}", server={"method": "ditto", "pull": pull}) for pull in (0.0, 5.0))
    start = of_round(close, 1)[0]
    apart = [np.mean([np.linalg.norm(own(path, d) - start) for d in range(4)]) for path in (far, close)]
    assert apart[1] < 0.6 * apart[0]


def test_steps_of_one_device_by_hand(world, tmp_path):
    """One SGD step a round: v = v - eta (g / max(1, |g + lambda (v - P)|) ...) with the gradient that P_i had.

    With one step, P_i = P - eta clip(g(P)); in round 0 v begins at P, where the pull is zero, so v = P_i. In round 1
    it is pulled by lambda (v - P^1): a pull of zero and one of lambda differ in round 1 by eta lambda (v - P^1) where
    nothing is clipped.
    """
    device = {"max_steps": 1, "batch_size": 8, "learning_rate": 0.1, "optimizer": "sgd", "max_grad_norm": 1e6}
    found = {}
    for pull in (0.0, 2.0):
        path = run(world, tmp_path, f"one-step{pull}", device=device, server={"method": "ditto", "pull": pull})
        found[pull] = own(path, 3)
    v, mean = of_round(path, 0)[1][3], of_round(path, 1)[0]
    assert found[0.0] - found[2.0] == pytest.approx(0.1 * 2.0 * (v - mean), abs=1e-6)
    assert np.abs(v - mean).max() > 1e-3


def test_devices_side_by_side_after_a_stop(tmp_path, monkeypatch):
    """What is computed alone rounds otherwise: when the stop comes, a device of the pack is done, and two are not."""
    stop_at_step = 7
    world = write_world(tmp_path, kind="encoder", num_train=96, num_validation=24)
    device = {"batch_size": 8, "learning_rate": 0.05, "epochs": 1, "max_steps": 4, "pack": 3}
    federation = {"num_devices": 6, "sample_rate": 0.67, "rounds": 1, "partition": "dirichlet", "alpha": 0.5}
    changes = {"device": device, "federation": federation, "server": {"method": "ditto"}}
    changes["selection"] = {"strategy": "all"}
    whole, stopped = (write_config(world, tmp_path, name, **changes) for name in ("whole", "stopped"))
    assert cli.main(["run", str(whole)]) == 0
    beat, steps = LocalExchange.beat, itertools.count(1)

    def counting_beat(exchange, activity):
        if activity.startswith("training") and next(steps) == stop_at_step:
            exchange.stop.ask("the test")
        beat(exchange, activity)

    monkeypatch.setattr(LocalExchange, "beat", counting_beat)
    assert [cli.main(["run", str(stopped)]) for _ in range(2)] == [75, 0]
    trained = metrics(whole)[0]["devices"]
    assert all(np.array_equal(own(whole, device), own(stopped, device)) for device in trained)


def test_a_rejected_upload_after_a_stop(world, tmp_path, monkeypatch):
    """What its device has trained beside it is dropped for good: not taken for the next round's after another stop."""
    local_updates, calls = training.local_updates, itertools.count(1)
    stop_at = []

    def spoiling(*arguments, round_index, beat, **named):
        if (round_index, next(calls)) >= (stop_at or [(ROUNDS, 0)])[0]:
            del stop_at[0]
            beat.__self__.stop.ask("the test")
        for device, update in local_updates(*arguments, round_index=round_index, beat=beat, **named):
            is_bad = device == 0 and round_index == 0
            yield device, replace(update, params=update.params * np.float32(np.nan)) if is_bad else update

    monkeypatch.setattr(training, "local_updates", spoiling)
    server = {"method": "ditto", "max_rejected": 0.5}
    whole = run(world, tmp_path, "whole", server=server)
    calls = itertools.count(1)
    stop_at += [(0, 2), (1, 0)]  # while device 0 trains what it uploads; when the next round begins
    for status in (75, 75, 0):
        stopped = run(world, tmp_path, "stopped", server=server, status=status)
    assert metrics(stopped)[0]["rejected"]
    assert np.array_equal(own(whole, 0), own(stopped, 0))


def test_personalised_accuracy_is_with_the_own_models(world, tmp_path):
    device = {"epochs": 2, "batch_size": 8, "learning_rate": 0.2}
    federation = {"num_devices": 4, "sample_rate": 1.0, "rounds": 3, "partition": "dirichlet", "alpha": 0.1}
    server = {"method": "ditto", "pull": 0.0}
    path = run(world, tmp_path, "personal", device=device, federation=federation, server=server)
    last = metrics(path)[-1]
    assert last["accuracy"] > last["accuracy_global"]  # devices of few classes


def test_refused_beside_layers_of_ones_own(world, tmp_path, capsys):
    selection = {"strategy": "first", "ratio": 0.5}
    run(world, tmp_path, "refused", server={"method": "ditto"}, selection=selection, status=2)
    assert "selection.strategy: all" in capsys.readouterr().err
    run(world, tmp_path, "frozen", server={"method": "ditto"}, selection={**selection, "local_layers": "frozen"})
