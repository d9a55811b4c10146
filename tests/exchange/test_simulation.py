"""Devices on simulated links: the clock changes no number, absent devices leave no trace in the server's step."""

import csv
import math

import h5py
import numpy as np
import pytest
from backbones import make_config
from tiny import KEY_WIDTH, NUM_DEVICES, NUM_TOKENS, final_prompts, metrics, run_dir

from fedhpc.config.sections import SimulationConfig
from fedhpc.exchange.rounds import plan_round
from fedhpc.exchange.simulation import Load, device_seconds, round_seconds
from fedhpc.federation.partition import Partition
from fedhpc.job.run_files import is_record

LINK = {"down_mbit": 20.0, "up_mbit": 5.0, "latency_s": 0.05, "step_seconds": 0.2}
LAYER_BYTES = 4 * 2 * NUM_TOKENS * KEY_WIDTH
"""Of a layer's keys and values."""
LOAD = Load(down=1_000_000, up=500_000)
# Section 11 of the design by hand: 2 * 0.05 + 8 * 1 / 20 + 30 * 0.2 + 8 * 0.5 / 5
BY_HAND = 0.1 + 0.4 + 6.0 + 0.8


def clock(**values):
    return SimulationConfig.model_validate(values)


def facts(**values):
    return {
        "devices": [4, 7],
        "absent": [],
        "device_steps": [30, 10],
        "device_bytes": [LOAD.down, LOAD.up],
        "seconds": {"step": 0.5, "server": 0.25},
        **values,
    }


def numbers(table):
    (row,) = csv.DictReader(table.read_text().splitlines())
    return row


def test_a_devices_round_is_its_way_there_its_steps_and_its_way_back():
    assert device_seconds(clock(**LINK), 42, 3, steps=30, load=LOAD) == pytest.approx(BY_HAND)
    # Links that are not given take no time, and a step what was measured.
    assert device_seconds(clock(latency_s=1.0), 42, 3, steps=30, load=LOAD, measured=0.5) == pytest.approx(2 + 15)


def test_slowness_is_lognormal_and_each_devices_own():
    simulation = clock(step_seconds=1.0, slowness=0.5)
    seconds = [device_seconds(simulation, 42, device, steps=1, load=LOAD) for device in range(4000)]
    assert np.log(seconds).mean() == pytest.approx(0.0, abs=3 * 0.5 / math.sqrt(4000))
    assert np.log(seconds).std() == pytest.approx(0.5, rel=3 / math.sqrt(2 * 4000))
    assert seconds[7] == device_seconds(simulation, 42, 7, steps=1, load=LOAD)
    assert seconds[7] != device_seconds(simulation, 43, 7, steps=1, load=LOAD)


def test_a_round_lasts_as_long_as_its_slowest_device_and_the_server():
    assert round_seconds(clock(**LINK), 42, facts()) == pytest.approx(BY_HAND + 0.25)
    assert round_seconds(clock(**LINK), 42, facts(absent=[{"device": 4}])) == pytest.approx(BY_HAND - 20 * 0.2 + 0.25)
    late = facts(absent=[{"device": 4}])
    assert round_seconds(clock(**LINK, deadline_s=5.0), 42, late) == pytest.approx(5.25)
    assert round_seconds(clock(latency_s=1.0), 42, facts()) == pytest.approx(2 + 30 * 0.5 + 0.25)


def test_there_is_no_time_without_a_clock_nor_for_rounds_from_before_it():
    assert round_seconds(clock(drop_out=0.5), 42, facts()) is None
    assert round_seconds(clock(**LINK), 42, {"devices": [4], "seconds": {"server": 0.1}}) is None


def test_a_clock_changes_no_number_and_counts_what_is_exchanged(fedhpc, run_config):
    plain, timed = run_config("plain"), run_config("timed", simulation=LINK)
    assert fedhpc("run", plain)[0] == fedhpc("run", timed)[0] == 0
    assert final_prompts(plain) == final_prompts(timed)
    for record in metrics(timed):
        assert record["device_bytes"] == [2 * LAYER_BYTES, 2 * LAYER_BYTES]  # half of 4 layers
        assert sum(record["device_steps"]) == record["steps"]
        slowest = max(record["device_steps"]) * 0.2 + 0.1 + 8 * 2 * LAYER_BYTES * (1 / 20e6 + 1 / 5e6)
        assert record["seconds"]["simulated"] == pytest.approx(slowest + record["seconds"]["server"])
    assert all("simulated" not in record["seconds"] for record in metrics(plain))
    # The clock may be set anew, a run goes on all the same.
    assert fedhpc("run", timed, "--set", "federation.rounds=4", "--set", "simulation.up_mbit=1")[0] == 0


def test_absent_devices_have_no_part_in_the_mean(fedhpc, run_config):
    config = run_config(
        server__method="fedavg", federation__sample_rate=1.0, federation__rounds=2, simulation={"drop_out": 0.4}
    )
    assert fedhpc("run", config)[0] == 0
    everybody = [list(range(NUM_DEVICES))] * 2
    gone = [[entry["device"] for entry in record["absent"]] for record in metrics(config)]
    assert [sorted(record["devices"]) for record in metrics(config)] == everybody
    assert 0 < len(gone[0]) < NUM_DEVICES
    assert gone[0] != gone[1]
    for record, absent in zip(metrics(config), gone, strict=True):
        with h5py.File(run_dir(config) / f"traces/round_{record['round']:06d}.h5") as trace:
            ids, n, uploads = trace["device_ids"][()], trace["num_examples"][()], trace["uploads"][()]
            mean = np.tensordot(n / n.sum(), uploads.astype(np.float64), 1)
            assert np.abs(trace["result"][()] - mean).max() <= 1e-6 * np.abs(mean).max()
        assert sorted(ids) == [device for device in range(NUM_DEVICES) if device not in absent]
        assert all(entry["reason"] == "dropped out" for entry in record["absent"])
        # Everybody has received the prompts.
        assert record["bytes"] == (2 * NUM_DEVICES - len(absent)) * 2 * LAYER_BYTES


def test_drop_outs_come_as_often_as_asked_and_by_seed_round_and_device():
    examples = [np.arange(8)] * 100
    partition = Partition(train=examples, validation=examples)

    def absent(index, seed=42):
        config = make_config("unused", seed=seed, federation={"sample_rate": 1.0}, simulation={"drop_out": 0.3})
        return plan_round(config, partition, index, LOAD).absent

    assert np.mean([len(absent(index)) / 100 for index in range(40)]) == pytest.approx(
        0.3, abs=3 * math.sqrt(0.21 / 4000)
    )
    assert absent(3) == absent(3)
    assert absent(3) != absent(4)
    assert absent(3) != absent(3, seed=43)


def test_who_would_be_late_does_not_begin(fedhpc, run_config):
    deadline = {**LINK, "deadline_s": 0.6}  # two steps and the way, but not three
    config = run_config(federation__sample_rate=1.0, device__batch_size=8, simulation=deadline)
    assert fedhpc("run", config)[0] == 0
    for record in metrics(config):
        late = [device for device, steps in zip(record["devices"], record["device_steps"], strict=True) if steps > 2]
        assert [entry["device"] for entry in record["absent"]] == late
        assert late
        assert all(entry["reason"].startswith("late (") for entry in record["absent"])
        assert record["seconds"]["simulated"] == pytest.approx(0.6 + record["seconds"]["server"])


def test_a_round_that_nobody_takes_part_in_is_skipped_said_and_counted(fedhpc, run_config, tmp_path):
    config = run_config(simulation={**LINK, "deadline_s": 0.01})
    status, out, err = fedhpc("run", config)
    assert status == 0
    assert "round 2 skipped, nobody takes part" in err
    assert "loss -" in out
    records = metrics(config)
    assert [len(record["absent"]) for record in records] == [6, 6, 6]
    assert records[-1]["accuracy"] == records[0]["accuracy"]
    assert not list((run_dir(config) / "traces").glob("*"))
    assert fedhpc("report", run_dir(config), "--out", tmp_path / "page.html")[0] == 0
    assert numbers(tmp_path / "page.csv")["skipped_rounds_mean"] == "3.0"


def test_an_interruption_leaves_no_trace_where_rounds_are_skipped(fedhpc, run_config):
    settings = {"federation__sample_rate": 0.17, "federation__rounds": 8, "simulation": {"drop_out": 0.6}}
    through, stopped = run_config("through", **settings), run_config("stopped", **settings)
    assert fedhpc("run", through)[0] == 0
    skipped = [record["round"] for record in metrics(through) if len(record["absent"]) == 2]
    assert skipped
    for rounds in (skipped[0], skipped[0] + 1, 8):
        assert fedhpc("run", stopped, "--set", f"federation.rounds={max(rounds, 1)}")[0] == 0
    assert final_prompts(through) == final_prompts(stopped)
    for ours, theirs in zip(metrics(through), metrics(stopped), strict=True):
        assert [ours[key] for key in ("absent", "loss", "steps")] == [
            theirs[key] for key in ("absent", "loss", "steps")
        ]


def test_a_report_has_the_accuracy_by_simulated_time_and_can_set_the_clock_anew(fedhpc, run_config, tmp_path):
    config = run_config(simulation=LINK)
    assert fedhpc("run", config)[0] == 0

    def simulated(*options):
        status, _, err = fedhpc(
            "report", run_dir(config), "--out", tmp_path / "page.html", "--target", "0.01", *options
        )
        assert status == 0, err
        found = numbers(tmp_path / "page.csv")
        return [float(found[f"seconds_simulated{part}_mean"]) for part in ("", "_to_target")]

    seconds = [record["seconds"]["simulated"] for record in metrics(config)]
    assert simulated() == pytest.approx([sum(seconds), seconds[0]])
    assert "by simulated time" in (tmp_path / "page.html").read_text()
    slower = simulated("--set", "simulation.up_mbit=0.5")
    assert slower[0] - sum(seconds) == pytest.approx(3 * 8 * 2 * LAYER_BYTES * (1 / 0.5e6 - 1 / 5e6))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"drop_out": 1}, "simulation.drop_out: should be less than 1, found 1"),
        ({"deadline_s": 5.0}, "simulation.deadline_s needs simulation.step_seconds as a number"),
        ({"over_selection": 0.3}, "simulation.over_selection needs simulation.step_seconds as a number"),
        ({"over_selection": -0.1}, "simulation.over_selection: should be greater than or equal to 0, found -0.1"),
        (
            {"over_selection": 1.5, "step_seconds": 1.0},
            "simulation.over_selection: 1.5 samples 15 devices for 6 a round, of 12 that can train",
        ),
        ({"step_seconds": 0}, "simulation.step_seconds: should be greater than 0 or 'measured', found 0"),
        ({"up_mbit": -1}, "simulation.up_mbit: should be greater than or equal to 0.000001, found -1"),
        # With these a round's time were infinite, and its line of the metrics none.
        ({"slowness": 1000}, "simulation.slowness: should be less than or equal to 5, found 1000"),
        ({"latency_s": 1e308}, "simulation.latency_s: should be less than or equal to 1000000000, found 1e+308"),
        ({"down_mbit": 5e-324}, "simulation.down_mbit: should be greater than or equal to 0.000001, found 5e-324"),
    ],
)
def test_what_cannot_be_simulated_is_refused(fedhpc, run_config, settings, message):
    config = run_config(simulation=settings)
    status, _, err = fedhpc("run", config)
    assert status == 2
    assert message in err
    assert not run_dir(config).exists()


def test_the_slowest_clock_still_tells_a_time_that_is_recorded():
    slowest = clock(down_mbit=1e-6, up_mbit=1e-6, latency_s=1e9, step_seconds=1e9, slowness=5.0)
    load = Load(down=10**12, up=10**12)
    times = [device_seconds(slowest, 42, device, steps=10**6, load=load) for device in range(1000)]
    assert is_record(facts(round=0, bytes=1, accuracy=None, seconds={"step": 1.0, "server": max(times)}))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("simulation.drop_out=0.1", "of finished runs only simulation.down_mbit, simulation.up_mbit"),
        ("simulation.up_mbits=1", "unknown key; did you mean simulation.up_mbit"),
        ("simulation.up_mbit=2", "went by a deadline; it keeps its clock"),
    ],
)
def test_a_report_sets_nothing_but_the_clock(fedhpc, run_config, tmp_path, override, message):
    config = run_config(simulation={**LINK, "deadline_s": 0.01})
    assert fedhpc("run", config)[0] == 0
    status, _, err = fedhpc("report", run_dir(config), "--out", tmp_path / "page.html", "--set", override)
    assert status == 2
    assert message in err


def test_another_deadline_or_drop_out_is_another_run(fedhpc, run_config):
    config = run_config(simulation={**LINK, "deadline_s": 100.0})
    assert fedhpc("run", config)[0] == 0
    for override in ("simulation.deadline_s=1.0", "simulation.up_mbit=1.0", "simulation.drop_out=0.5"):
        status, _, err = fedhpc("run", config, "--set", override)
        assert status == 2
        assert f"{override.partition('=')[0]}: " in err


# Seconds of a device's round, one a step, and the order in which devices 0 to 5 arrive.
STEPS = [3, 6, 4, 2, 1, 5]
IN_ORDER = [4, 3, 0, 2, 5, 1]


def over_selected(share=0.5, index=0, **simulation):
    """A round of 4 of 6 devices with so many steps, 6 of them sampled."""
    partition = Partition(train=[np.arange(8 * steps) for steps in STEPS], validation=[np.arange(8)] * 6)
    config = make_config(
        "unused",
        federation={"num_devices": 6, "sample_rate": 4 / 6},
        device={"epochs": 1, "batch_size": 8},
        simulation={"step_seconds": 1.0, "over_selection": share, **simulation},
    )
    return config, plan_round(config, partition, index, LOAD)


def test_of_more_devices_than_wanted_the_first_that_arrive_take_part():
    _, this = over_selected()
    assert sorted(this.sampled) == list(range(6))
    assert sorted(this.present) == sorted(IN_ORDER[:4])
    assert this.absent == {5: "late (5 s, not of the first 4)", 1: "late (6 s, not of the first 4)"}
    assert list(this.absent) == [device for device in this.sampled if device in (1, 5)]
    # All have received the prompts, four have sent theirs.
    assert this.record()["bytes"] == 6 * LOAD.down + 4 * LOAD.up


@pytest.mark.parametrize(("share", "count"), [(0.0, 4), (0.1, 5), (0.25, 5), (0.3, 6), (0.5, 6)])
def test_so_many_more_are_sampled_rounded_up(share, count):
    config, this = over_selected(share)
    assert len(this.sampled) == config.devices_sampled == count
    assert len(this.present) == 4


def test_over_selection_makes_up_for_drop_outs_and_for_a_deadline():
    _, this = over_selected(drop_out=0.4, deadline_s=5.0)
    gone = [device for device, reason in this.absent.items() if reason == "dropped out"]
    left = [device for device in IN_ORDER if device not in gone]
    assert gone
    assert sorted(this.present) == sorted(device for device in left[:4] if STEPS[device] <= 5)
    assert over_selected(deadline_s=3.0)[1].absent == {
        2: "late (4 s)",
        1: "late (6 s)",
        5: "late (5 s)",
    }


@pytest.mark.parametrize(("deadline", "seconds"), [(None, 4.25), (10.0, 4.25), (3.5, 3.75)])
def test_the_server_waits_for_the_first_or_until_the_deadline(deadline, seconds):
    config, this = over_selected(deadline_s=deadline)
    record = this.record() | {"seconds": {"step": 0.0, "server": 0.25}}
    assert round_seconds(config.simulation, config.seed, record) == pytest.approx(seconds)


def test_what_does_not_take_part_has_no_part_in_the_mean_and_keeps_its_clock(fedhpc, run_config, tmp_path):
    simulation = {**LINK, "over_selection": 0.5, "slowness": 1.0}
    config = run_config(simulation=simulation)
    assert fedhpc("run", config)[0] == 0
    for record in metrics(config):
        assert [len(record["devices"]), len(record["absent"])] == [9, 3]
        with h5py.File(run_dir(config) / f"traces/round_{record['round']:06d}.h5") as trace:
            absent = {entry["device"] for entry in record["absent"]}
            assert trace["device_ids"][()].tolist() == [each for each in record["devices"] if each not in absent]
    for override in ("simulation.over_selection=0.2", "simulation.up_mbit=1.0"):
        assert fedhpc("run", config, "--set", override)[0] == 2
    page = ("--out", tmp_path / "page.html", "--set", "simulation.up_mbit=2")
    status, _, err = fedhpc("report", run_dir(config), *page)
    assert (status, "went by over-selection; it keeps its clock" in err) == (2, True)
