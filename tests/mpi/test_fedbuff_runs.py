"""FedBuff as a run: the same bits however it is run, its metrics and report, and what it does not go together with."""

import csv

import h5py
import numpy as np
import pytest
import tiny
from run_each import run
from tiny import final_prompts, final_tensors, metrics, run_dir

from fedhpc.checkpoint.files import SERVER_FILE
from fedhpc.checkpoint.store import Checkpoints
from fedhpc.exchange.messages import Op


def test_without_delays_it_is_averaging(fedhpc, run_config):
    same = {
        "federation__rounds": 2,
        "device__max_steps": 1,
        "server__weights": "uniform",
        "simulation__step_seconds": 1.0,
        "trace": False,
    }
    buffered = run_config("buffered", server__method="fedbuff", server__concurrency=6, **same)
    plain = run_config("plain", server__method="fedavgm", server__momentum=0.0, **same)
    assert fedhpc("run", buffered)[0] == fedhpc("run", plain)[0] == 0
    ours, theirs = (np.frombuffer(final_prompts(each), np.float32) for each in (buffered, plain))
    assert np.abs(ours - theirs).max() < 1e-6
    for one, other in zip(metrics(buffered), metrics(plain), strict=True):
        assert one["devices"] == other["devices"]
        assert one["staleness"] == {"mean": 0.0, "max": 0}
        assert one["seconds"]["simulated"] - one["seconds"]["server"] == pytest.approx(1.0)
        assert "staleness" not in other


SETTINGS = {
    "server__method": "fedbuff",
    "server__concurrency": 5,
    "federation__sample_rate": 0.25,
    "federation__rounds": 6,
    "simulation__step_seconds": 1.0,
    "simulation__slowness": 1.0,
    "simulation__drop_out": 0.2,
    "evaluate__every": 2,
    "checkpoint__every": 2,
    "trace": False,
}


@pytest.fixture(scope="module")
def through(world, tmp_path_factory):
    """The run that every other must equal."""
    config = tiny.write_config(world, tmp_path_factory.mktemp("fedbuff"), "through", **SETTINGS)
    assert run(config) == Op.FINISH
    return config


def facts(config):
    keys = ("devices", "absent", "taken", "staleness", "between_steps_s", "loss", "accuracy", "update_norm")
    return [[record[key] for key in keys] for record in metrics(config)]


def test_stops_leave_no_trace(run_config, through):
    stale = [record["staleness"]["max"] for record in metrics(through)]
    assert max(stale) >= 2
    between, within = run_config("between", **SETTINGS), run_config("within", **SETTINGS)
    for rounds in (1, 4, 6):
        assert run(between.with_suffix(".yaml") if rounds == 6 else shorter(between, rounds)) == Op.FINISH
    assert run(within, 9) == Op.SUSPEND
    assert run(within, 5) == Op.SUSPEND
    assert run(within) == Op.FINISH
    for config in (between, within):
        assert final_tensors(config) == final_tensors(through)
        assert facts(config)[-1] == facts(through)[-1]
    assert facts(within) == facts(through)


def shorter(config, rounds):
    path = config.with_name(f"{config.stem}-{rounds}.yaml")
    path.write_text(config.read_text().replace("rounds: 6", f"rounds: {rounds}"))
    return path


def test_changes_arrive_although_nobody_begins(run_config):
    few = {"federation__num_devices": 4, "server__concurrency": 3, "device__max_steps": 1}
    config = run_config(**{**SETTINGS, **few, "federation__rounds": 12, "simulation__drop_out": 0.6})
    assert run(config) == Op.FINISH
    found = [(len(each["devices"]) > len(each["absent"]), bool(each["taken"])) for each in metrics(config)]
    assert {(False, True), (True, True)} <= {*found}
    for record in metrics(config):
        assert (record["loss"] is None) == (len(record["devices"]) == len(record["absent"]))
        assert (record["update_norm"] > 0) == bool(record["taken"])


def test_layers_that_leave_the_exchange_leave_what_is_under_way_too(run_config):
    automatic = {"selection__ratio": "auto", "selection__warmup_rounds": 1, "federation__rounds": 2}
    config = run_config(**{**SETTINGS, **automatic, "checkpoint__keep": 3, "checkpoint__every": 1})
    assert run(config) == Op.FINISH
    checkpoints = Checkpoints(run_dir(config))
    layers = []
    for position in checkpoints.positions():
        with h5py.File(checkpoints.path(position) / SERVER_FILE) as file:
            names = [name for name in file if name.startswith("in_flight.")]
            assert names
            assert {file[name].shape for name in names} == {file["prompts"].shape}
            layers.append(len(file["prompts"]))
    assert layers[0] < layers[1] == tiny.NUM_LAYERS


def test_a_report_has_its_time_and_keeps_its_clock(fedhpc, through, tmp_path):
    page = tmp_path / "page.html"
    status, _, err = fedhpc("report", run_dir(through), "--out", page)
    assert status == 0, err
    (row,) = csv.DictReader(page.with_suffix(".csv").read_text().splitlines())
    seconds = sum(record["seconds"]["simulated"] for record in metrics(through))
    assert float(row["seconds_simulated_mean"]) == pytest.approx(seconds)
    assert "by simulated time" in page.read_text()
    assert row["skipped_rounds_mean"] == ""
    status, _, err = fedhpc("report", run_dir(through), "--out", page, "--set", "simulation.slowness=0.5")
    assert (status, "went by the order of arrival; it keeps its clock" in err) == (2, True)
    for override in ("simulation.slowness=0.5", "simulation.up_mbit=1.0", "server.concurrency=4"):
        assert fedhpc("run", through, "--set", override)[0] == 2
    assert fedhpc("plan", through, "--ranks", "3")[0] == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"simulation__step_seconds": "measured"},
            "fedbuff needs simulation.step_seconds as a number: the order in which changes arrive",
        ),
        ({"exchange__mode": "reduce"}, "fedbuff needs each upload by itself; it needs exchange.mode: gather"),
        ({"trace": True}, "fedbuff steps by changes of several rounds, of which a trace has but one round's"),
        ({"simulation__deadline_s": 3.0}, "fedbuff waits for no device; simulation.deadline_s: 3 is for"),
        ({"simulation__over_selection": 0.5}, "fedbuff waits for no device; simulation.over_selection: 0.5 is for"),
        ({"server__concurrency": 2}, "server.concurrency: 2 devices at work at a time; valid: from 3"),
        ({"server__concurrency": 13}, "13 devices at work at a time; valid: from 3, which a step takes"),
        ({"server__concurrency": 12, "federation__held_out": 0.1}, "(federation.sample_rate), to 11, which can train"),
        ({"server__staleness": -1}, "server.staleness: should be greater than or equal to 0"),
    ],
)
def test_what_it_does_not_go_together_with(fedhpc, run_config, settings, message):
    config = run_config(**{**SETTINGS, **settings})
    status, _, err = fedhpc("run", config)
    assert status == 2
    assert message in err
    assert not run_dir(config).exists()
