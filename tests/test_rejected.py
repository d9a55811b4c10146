"""Uploads that no local update can have produced do not reach the server's state."""

from dataclasses import replace

import h5py
import numpy as np
import pytest
from tiny import final_prompts, metrics, run_dir

from fedhpc import device
from fedhpc.errors import EXIT_USER_ERROR
from fedhpc.updates import Fault, fault_of

BAD = 3


@pytest.fixture
def spoil(monkeypatch):
    """From now on the local updates of these devices are changed by a function."""
    local_updates = device.local_updates

    def change(spoiled, *devices):
        def spoiling(*arguments, **named):
            for number, update in local_updates(*arguments, **named):
                yield number, replace(update, params=spoiled(update.params)) if number in devices else update

        monkeypatch.setattr(device, "local_updates", spoiling)

    return change


def nan(params):
    return np.where(np.arange(params.size) == 5, np.nan, params).astype(np.float32)


def infinite(params):
    return np.where(np.arange(params.size) == 5, np.inf, params).astype(np.float32)


def huge(params):
    return params * np.float32(1e6)


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


@pytest.mark.parametrize(("factor", "sound"), [(0.9, True), (3.2, True), (11.0, False)])
def test_what_adam_can_do_is_never_rejected(factor, sound):
    """One Adam step moves a parameter by at most (1 - beta1) / sqrt(1 - beta2) = 3.2 learning rates."""
    start, steps, rate = np.zeros(1000, np.float32), 7, 0.01
    params = start + np.float32(factor * steps * rate)
    assert (fault_of(params, start, num_steps=steps, learning_rate=rate)[0] == Fault.NONE) == sound
