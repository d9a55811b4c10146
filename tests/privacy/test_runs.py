"""Whole runs under privacy: what they release, refuse and say, and where they end."""

import json
import sys
from dataclasses import replace

import h5py
import numpy as np
import pytest
import tiny
from tiny import final_prompts, metrics, run_dir

from fedhpc.commands.report.runs import read_run
from fedhpc.config import Config, least_values
from fedhpc.config.file import load_config
from fedhpc.device import training
from fedhpc.errors import ConfigError
from fedhpc.privacy.accounting import Sampling, costs
from fedhpc.server.job import job_notices, load_job

BASE = {
    "trace": False,
    "federation__rounds": 2,
    "server__method": "fedavg",
    "server__weights": "uniform",
    "exchange__mode": "reduce",
    "selection__strategy": "last",
}
PRIVATE = {**BASE, "privacy": {"clip": 0.5, "noise": 1.0}}
ONE = 3
"""A device that takes part in the first round."""


@pytest.fixture
def change_one(monkeypatch):
    """From now on, what the device ONE finds in a round is changed by a function of its update and P^t."""
    local_updates = training.local_updates

    def change(changed):
        def changing(*arguments, start, **named):
            for number, update in local_updates(*arguments, start=start, **named):
                yield number, changed(update, start) if number == ONE else update

        monkeypatch.setattr(training, "local_updates", changing)

    return change


def told(config):
    """The lines of the metrics without times."""
    return [{key: value for key, value in record.items() if key != "seconds"} for record in metrics(config)]


@pytest.mark.parametrize("method", ["fedavg", "fedpeptao"])
def test_without_noise_and_clip_the_bits_are_those_without_privacy(run_config, fedhpc, method):
    changes = {**BASE, "server__method": method}
    plain = run_config("plain", **changes)
    private = run_config("private", **changes, privacy={"clip": float("inf"), "noise": 0.0})
    for config in (plain, private):
        assert fedhpc("run", config)[0] == 0
    assert final_prompts(private) == final_prompts(plain)
    assert {record["epsilon"] for record in metrics(private)} == {None}
    assert [record["accuracy_global"] for record in told(private)] == [r["accuracy_global"] for r in metrics(plain)]


def test_a_private_run_tells_its_cost_and_nothing_of_single_devices(run_config, fedhpc):
    config = run_config(**PRIVATE)
    status, out, _ = fedhpc("run", config)
    assert status == 0
    of_one = costs(1.0, Sampling(num_devices=12, sampled=6, with_count=False), 1e-5)
    spent = [of_one.epsilon(rounds) for rounds in (1, 2)]
    assert [record["epsilon"] for record in metrics(config)] == pytest.approx(spent)
    for epsilon, line in zip(spent, out.splitlines(), strict=True):
        assert f"epsilon {epsilon:.3f}" in line
    words = f"noise z 1, clip C 0.5, 6 of 12 devices a round, 2 rounds: epsilon {spent[-1]:.4g} at delta 1e-05"
    assert f"privacy: {words}" in (run_dir(config) / "log.txt").read_text()
    assert words in fedhpc("plan", config, "--ranks", 3)[1]
    assert read_run(run_dir(config)).is_finished
    for record in metrics(config):
        assert record["loss"] is None
        assert (
            record["accuracy"] == record["accuracy_global"]
        )  # devices have layers of their own, of which it is silent
        assert not record.keys() & {
            *("devices", "absent", "device_steps", "examples", "steps", "rejected", "device_accuracy"),
        }
    status, _, _ = fedhpc("report", run_dir(config), "--out", run_dir(config) / "report.html")
    assert status == 0
    assert f"{spent[-1]:.3f}" in (run_dir(config) / "report.html").read_text()


def test_a_device_s_data_reach_the_rest_through_its_clipped_change_alone(run_config, fedhpc, change_one):
    """Two federations that differ in all that one device finds, but not in where that is when it is clipped."""
    found = {}
    for length in (0.5, 2.0):

        def elsewhere(update, start, length=length):
            params = start.copy()
            params[5] += np.float32(length)
            return replace(update, params=params, loss=length)

        change_one(elsewhere)
        config = run_config(f"run{length}", **{**PRIVATE, "privacy": {"clip": 0.1, "noise": 1.0, "quantile": 0.5}})
        assert fedhpc("run", config)[0] == 0
        found[length] = final_prompts(config), told(config)
    assert found[0.5] == found[2.0]


def test_a_rejected_device_adds_no_change(run_config, fedhpc, change_one):
    changes = {**PRIVATE, "federation__rounds": 1, "federation__sample_rate": 1.0}
    found = []
    for name, params in (("rejected", lambda start: start * np.float32("nan")), ("still", lambda start: start.copy())):
        change_one(lambda update, start, params=params: replace(update, params=params(start)))
        config = run_config(name, **changes)
        assert fedhpc("run", config)[0] == 0
        found.append((final_prompts(config), told(config)))
    assert found[0] == found[1]


def test_a_run_ends_before_the_round_that_would_pass_its_budget(run_config, fedhpc):
    of_one = costs(1.0, Sampling(num_devices=12, sampled=6, with_count=False), 1e-5)
    budget = (of_one.epsilon(1) + of_one.epsilon(2)) / 2
    changes = {**BASE, "evaluate": {"every": 9, "examples": 5}}
    through = run_config("through", **changes, privacy={"clip": 0.5, "noise": 1.0})
    config = run_config("run", **changes, privacy={"clip": 0.5, "noise": 1.0, "epsilon": budget})
    assert fedhpc("run", through)[0] == 0
    status, _, _ = fedhpc("run", config)
    assert status == 0
    assert len(metrics(config)) == 1
    assert metrics(config)[-1]["evaluated"] == metrics(through)[-1]["evaluated"] > 5
    assert read_run(run_dir(config)).is_finished
    text = (run_dir(config) / "log.txt").read_text()
    assert "which is after 1: the next one would pass the budget" in text
    assert "the budget is spent: 1 of 2 rounds have cost epsilon" in text
    assert fedhpc("run", config)[0] == 0
    assert len(metrics(config)) == 1
    assert fedhpc("run", config, "--set", f"privacy.epsilon={of_one.epsilon(2) + 0.1}")[0] == 0
    assert final_prompts(config) == final_prompts(through)


def test_a_run_goes_on_with_the_clip_of_its_checkpoint(run_config, fedhpc):
    changes = {**BASE, "privacy": {"clip": 0.5, "noise": 1.0, "quantile": 0.5}}
    through, parts = run_config("through", **changes), run_config("parts", **changes)
    assert fedhpc("run", through)[0] == 0
    for rounds in (1, 2):
        assert fedhpc("run", parts, "--set", f"federation.rounds={rounds}")[0] == 0
    clips = [record["clip"] for record in metrics(through)]
    assert len(set(clips)) == 2
    assert [record["clip"] for record in metrics(parts)] == clips
    assert final_prompts(parts) == final_prompts(through)
    with h5py.File(tiny.server_file(parts)) as file:
        assert json.loads(file.attrs["scalars"])["clip"] not in clips


def test_noise_is_calibrated_for_the_rounds_of_the_run(run_config, fedhpc):
    changes = {**BASE, "federation__sample_rate": 1.0, "privacy": {"clip": 0.5, "epsilon": 20.0, "delta": 1e-2}}
    config = run_config(**changes)
    assert fedhpc("run", config)[0] == 0
    assert metrics(config)[-1]["epsilon"] == pytest.approx(20.0, abs=1e-3)
    status, _, err = fedhpc("run", config, "--set", "federation.rounds=3")
    assert status == 2
    assert "federation.rounds: 2 in the checkpoint, 3 now" in err


REFUSED = [
    ({"exchange": {"mode": "gather"}}, "exchange.mode: gather: it shows the server each upload; take exchange.mode"),
    ({"exchange": {"mode": "reduce", "encoding": "topk"}}, "topk: it sends something else than the clipped vector"),
    ({"trace": True}, "trace: true: it writes uploads as they are; take trace: false"),
    ({"server": {"method": "fedavg"}}, "server.weights: examples: it lets devices with more data add more; take"),
    ({"server": {"method": "scaffold", "weights": "uniform"}}, "server.method: scaffold: it needs more of the uploads"),
    ({"server": {"variant": "paper", "weights": "uniform"}}, "server.method: paper: it needs more of the uploads"),
    ({"selection": {"strategy": "score"}}, "strategy: score: it selects by what it reads of the devices' data; take"),
    ({"selection": {"strategy": "sensitivity"}}, "strategy: sensitivity: it selects by what it reads of the devices'"),
    ({"selection": {"strategy": "last", "ratio": "auto"}}, "selection.ratio: auto: it decides by what it reads"),
    ({"device": {"pack": 2}}, "device.pack: 2: it pads several devices' texts to one length"),
    ({"privacy": {"clip": 1.0}}, "privacy.clip needs privacy.epsilon, from which the noise is calibrated, or"),
    ({"privacy": {"epsilon": 1.0}}, "privacy.epsilon: 1 needs privacy.clip, without which there is no privacy"),
    ({"privacy": {"noise": 1.0}}, "privacy.noise: 1 needs privacy.clip, without which there is no privacy"),
    ({"privacy": {"clip": float("inf"), "noise": 1.0}}, "privacy.clip: .inf bounds nobody's change"),
    ({"privacy": {"clip": 1.0, "noise": 0.0, "epsilon": 1.0}}, "privacy.noise: 0 protects nobody"),
    ({"privacy": {"clip": 1.0, "noise": 1.0, "delta": 0.0}}, "greater than 0"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_would_undo_privacy_is_refused(changes, message):
    values = {
        "server": {"method": "fedavg", "weights": "uniform"},
        "exchange": {"mode": "reduce"},
        "selection": {"strategy": "last"},
        "privacy": {"clip": 1.0, "noise": 1.0},
    }
    Config.model_validate(least_values() | values)
    with pytest.raises((ValueError, ConfigError)) as refused:
        Config.model_validate(least_values() | values | changes)
    assert message in str(refused.value)


def test_a_run_that_cannot_be_private_does_not_begin(run_config, fedhpc, monkeypatch):
    config = run_config(**PRIVATE, federation__sample_rate=1.0)
    status, _, err = fedhpc("run", config, "--set", "privacy.epsilon=0.5")
    assert status == 2
    assert "privacy.epsilon: 0.5 is less than one round costs with privacy.noise: 1 (" in err
    status, _, err = fedhpc("run", config, "--set", "privacy.noise=null", "--set", "privacy.epsilon=1e7")
    assert status == 2
    assert "privacy.epsilon: 1e+07 over federation.rounds: 2 is what no noise z from 0.05 to 1e9 costs" in err
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    status, _, err = fedhpc("run", config)
    assert status == 2
    assert "dp-accounting, which is not installed: pip install 'fedhpc[privacy]'" in err
    assert not (run_dir(config) / "metrics.jsonl").exists()


def test_a_seed_that_can_be_guessed_and_a_large_delta_are_warned_about(run_config):
    config = run_config(**PRIVATE)
    (notice,) = job_notices(load_job(load_config(config)))
    assert "seed: 42 can be guessed, and with it the noise" in notice
    (notice,) = job_notices(load_job(load_config(config, [f"seed={1 << 61}", "privacy.delta=0.1"])))
    assert "privacy.delta: 0.1 should be well below 1 by the number of devices, 0.0833" in notice
