"""Uploads that no local update can have produced do not reach the server's state."""

from dataclasses import replace

import h5py
import numpy as np
import pytest
from backbones import make_config
from tiny import final_prompts, metrics, run_dir

from fedhpc.device import training
from fedhpc.errors import EXIT_USER_ERROR
from fedhpc.exchange.messages import upload_headers, upload_record
from fedhpc.methods.updates import Fault, fault_of
from fedhpc.server.soundness import sift

BAD = 3


@pytest.fixture
def spoil(monkeypatch):
    """From now on, and from a round on, the local updates of these devices are changed by a function."""
    local_updates = training.local_updates

    def change(spoiled, *devices, since=0):
        def spoiling(*arguments, round_index, **named):
            for number, update in local_updates(*arguments, round_index=round_index, **named):
                yield number, spoiled(update) if number in devices and round_index >= since else update

        monkeypatch.setattr(training, "local_updates", spoiling)

    return change


def with_one(vector, value):
    return np.where(np.arange(vector.size) == 5, value, vector).astype(np.float32)


def nan(update):
    return replace(update, params=with_one(update.params, np.nan))


def infinite(update):
    return replace(update, params=with_one(update.params, np.inf))


def huge(update):
    return replace(update, params=update.params * np.float32(1e6))


def nan_at_home(update):
    return replace(update, state=replace(update.state, local=with_one(update.state.local, np.nan)))


def nan_gradient(update):
    return replace(update, gradient=with_one(update.gradient, np.nan))


@pytest.mark.parametrize(("spoiled", "reason"), [(nan, "NaN"), (infinite, "infinite"), (huge, "larger than")])
def test_a_bad_upload_is_left_out_and_the_weights_are_those_of_the_others(run_config, fedhpc, spoil, spoiled, reason):
    config = run_config(server__method="fedavg", federation__sample_rate=1.0, federation__rounds=1)
    spoil(spoiled, BAD)
    status, _, err = fedhpc("run", config)
    assert status == 0
    (record,) = metrics(config)
    (rejected,) = record["rejected"]
    assert rejected["device"] == BAD
    assert reason in rejected["reason"]
    assert (rejected["norm"] is None) == (reason != "larger than")
    assert f"upload of device {BAD} rejected" in err
    with h5py.File(run_dir(config) / "traces/round_000000.h5") as trace:
        ids, n, uploads = trace["device_ids"][()], trace["num_examples"][()], trace["uploads"][()].astype(np.float64)
        assert sorted(ids) == [i for i in range(12) if i != BAD]
        mean = np.tensordot(n / n.sum(), uploads, 1)
        assert np.abs(trace["result"][()] - mean).max() <= 1e-6 * np.abs(mean).max()
    assert record["examples"] == n.sum()


def test_a_bad_upload_touches_neither_control_variates_nor_the_devices_own_state(run_config, fedhpc, spoil):
    config = run_config(federation__sample_rate=1.0, federation__rounds=1)
    spoil(nan, BAD)
    assert fedhpc("run", config)[0] == 0
    names = {path.name for kind in ("control", "local") for path in (run_dir(config) / "checkpoints" / kind).iterdir()}
    assert len(names) == 11
    assert not any(name.startswith(f"{BAD:06d}") for name in names)
    assert np.isfinite(np.frombuffer(final_prompts(config), np.float32)).all()


def test_sums_leave_a_bad_upload_out_as_uploads_do(run_config, fedhpc, spoil):
    spoil(nan, BAD, since=1)  # the device's upload of round 0 is still in memory
    prompts, examples = {}, {}
    for mode in ("gather", "reduce"):
        changes = {"server__method": "fedavg", "federation__sample_rate": 1.0, "federation__rounds": 2, "trace": False}
        config = run_config(mode, exchange__mode=mode, **changes)
        assert fedhpc("run", config)[0] == 0
        assert [rejected["device"] for rejected in metrics(config)[1]["rejected"]] == [BAD]
        prompts[mode] = np.frombuffer(final_prompts(config), np.float32)
        examples[mode] = [record["examples"] for record in metrics(config)]
    np.testing.assert_allclose(prompts["reduce"], prompts["gather"], rtol=0, atol=1e-6)
    assert examples["reduce"] == examples["gather"]


def test_bad_tensors_that_stay_at_home_are_not_kept(run_config, fedhpc, spoil):
    config = run_config(federation__sample_rate=1.0, federation__rounds=2)
    spoil(nan_at_home, BAD, since=1)
    assert fedhpc("run", config)[0] == 0
    assert not any(record["rejected"] for record in metrics(config))
    with h5py.File(max((run_dir(config) / "checkpoints/local").glob(f"{BAD:06d}_*.h5"))) as file:
        assert np.isfinite(file["local_prompts"][()]).all()


def test_an_upload_with_a_bad_gradient_is_left_out(run_config, fedhpc, spoil):
    changes = {"server__method": "mime", "device__optimizer": "sgd", "federation__rounds": 1}
    config = run_config(federation__sample_rate=1.0, **changes)
    spoil(nan_gradient, BAD)
    assert fedhpc("run", config)[0] == 0
    (record,) = metrics(config)
    assert [(rejected["device"], rejected["reason"]) for rejected in record["rejected"]] == [(BAD, "NaN")]


def test_too_many_bad_uploads_end_the_run_and_leave_the_last_checkpoint(run_config, fedhpc, spoil, capfd):
    config = run_config(federation__sample_rate=1.0)
    assert fedhpc("run", config, "--set", "federation.rounds=1")[0] == 0
    spoil(nan, 1, 2, BAD)
    with pytest.raises(SystemExit) as ended:
        fedhpc("run", config)
    assert ended.value.code == EXIT_USER_ERROR
    err = capfd.readouterr().err
    assert "3 of 12 uploads are bad, more than server.max_rejected: 0.2" in err
    assert "device 1: NaN" in err
    status, out, _ = fedhpc("inspect", run_dir(config))
    assert status == 0
    assert "round 1 completed" in out


def test_just_the_share_that_may_be_bad_is_let_pass():
    """0.29 * 100 is 28.999999999999996."""
    config = make_config("unused", server={"max_rejected": 0.29})
    headers = upload_headers(upload_record(0).zeros(100))
    headers["fault"][:29] = Fault.NAN
    assert len(sift(config, 0, np.zeros(1, np.float32), headers)[0]) == 71
    headers["fault"][29] = Fault.NAN
    with pytest.raises(FloatingPointError, match="30 of 100"):
        sift(config, 0, np.zeros(1, np.float32), headers)


@pytest.mark.parametrize(("factor", "sound"), [(0.9, True), (3.2, True), (11.0, False)])
def test_what_adam_can_do_is_never_rejected(factor, sound):
    """One Adam step moves a parameter by at most (1 - beta1) / sqrt(1 - beta2) = 3.2 learning rates."""
    start, steps, rate = np.zeros(1000, np.float32), 7, 0.01
    params = start + np.float32(factor * steps * rate)
    assert (fault_of(params, start, num_steps=steps, learning_rate=rate) == Fault.NONE) == sound
