"""A run that is stopped on request and started again ends with the bits of one that never was."""

import os
import signal
import time

import pytest
from tiny import final_tensors, metrics, run_dir

from fedhpc.checkpoint.store import Checkpoints
from fedhpc.errors import EXIT_STOPPED
from fedhpc.exchange import LocalExchange
from fedhpc.job.schedulers.slurm import SlurmEnvironment

VOLATILE = ("seconds", "bytes_down", "bytes_up")


@pytest.fixture
def stop_after(monkeypatch):
    """From now on every start is stopped after so many local steps or batches, by a real signal."""
    beat = LocalExchange.beat
    left = 0

    def counting_beat(exchange, activity):
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGUSR1)
        beat(exchange, activity)

    def after(count):
        nonlocal left
        left = count

    monkeypatch.setattr(LocalExchange, "beat", counting_beat)
    return after


def run_to_the_end(fedhpc, config, stop_after, counts):
    """Stop after each of the counts, then let the run end; the exit statuses."""
    statuses = []
    for count in [*counts, 0]:
        stop_after(count)
        statuses.append(fedhpc("run", config)[0])
    return statuses


SETTINGS = {
    "score, adam reset": {},
    "moments kept, linear schedule": {"device__reset_moments": False, "device__schedule": "linear"},
    "released": {"server__variant": "released"},
    "dropout": {"tuning__dropout": 0.2},
    "rare checkpoints": {"checkpoint__every": 100, "evaluate__every": 2},
    "packs": {"device__pack": 4, "server__variant": "paper"},
    "auto": {"selection__ratio": "auto", "selection__warmup_rounds": 2, "model__prepack_weights": True},
    "sums": {
        "exchange__mode": "reduce",
        "trace": False,
        "selection__ratio": "auto",
        "selection__warmup_rounds": 2,
        "selection__auto_by": "density",
    },
    "masked sums": {"exchange__mode": "secure", "trace": False},
    "fibecfed": {
        "tuning__kind": "lora",
        "curriculum": {"order": "fisher", "start": 0.4},
        "selection__strategy": "sensitivity",
        "sparse": {"fraction": 0.5},
        "server__method": "fedavg",
    },
    "16 bits": {"exchange__dtype": "float16", "device__pack": 3},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_interruptions_leave_no_trace_in_the_results(run_config, fedhpc, stop_after, setting):
    undisturbed = run_config("undisturbed", **SETTINGS[setting])
    assert fedhpc("run", undisturbed)[0] == 0
    config = run_config("disturbed", **SETTINGS[setting])
    counts = [5, 20, 4, 1, 17, 9, 31]
    statuses = run_to_the_end(fedhpc, config, stop_after, counts)
    assert statuses[:3] == [EXIT_STOPPED] * 3
    assert statuses[-1] == 0
    assert final_tensors(config) == final_tensors(undisturbed)
    ours, theirs = (
        [{key: value for key, value in record.items() if key not in VOLATILE} for record in metrics(path)]
        for path in (config, undisturbed)
    )
    assert ours == theirs
    assert all(record["seconds"]["idle"] >= 0 for record in metrics(config))


def test_what_a_curriculum_measured_before_a_stop_is_not_measured_again(run_config, fedhpc, stop_after, monkeypatch):
    config = run_config(**SETTINGS["fibecfed"], federation__sample_rate=1.0)
    stop_after(90)
    assert fedhpc("run", config)[0] == EXIT_STOPPED
    assert len(metrics(config)) == 1  # every device has been measured
    monkeypatch.setattr("fedhpc.device.curriculum.fisher_trace", None)
    assert fedhpc("run", config)[0] == 0


def test_a_checkpoint_within_a_round_needs_no_metrics_to_go_on(run_config, fedhpc, stop_after):
    undisturbed = run_config("undisturbed")
    assert fedhpc("run", undisturbed)[0] == 0
    config = run_config("stopped")
    stop_after(50)
    assert fedhpc("run", config)[0] == EXIT_STOPPED
    newest = Checkpoints(run_dir(config)).positions()[0]
    assert newest.part
    assert newest.round
    (run_dir(config) / "metrics.jsonl").unlink()
    assert fedhpc("run", config)[0] == 0
    assert final_tensors(config) == final_tensors(undisturbed)


def in_a_job(monkeypatch, seconds_left):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time() + seconds_left)))


def test_a_job_stops_itself_before_its_time_is_up(run_config, fedhpc, monkeypatch):
    in_a_job(monkeypatch, 60)
    config = run_config(federation__rounds=100000, checkpoint__stop_before_end_s=56.0, trace=False)
    began = time.monotonic()
    status, _, err = fedhpc("run", config)
    assert status == EXIT_STOPPED
    assert time.monotonic() - began < 30
    assert "stopped on request (the job's time limit is near)" in err


def test_a_job_too_short_for_its_own_guard_is_refused(run_config, fedhpc, monkeypatch):
    in_a_job(monkeypatch, 50)
    status, _, err = fedhpc("run", run_config())
    assert status == 2
    assert "checkpoint.stop_before_end_s: 60, but the job's time limit leaves" in err


def test_a_clock_that_jumps_does_not_stop_a_job(run_config, fedhpc, monkeypatch):
    in_a_job(monkeypatch, 3600)
    now = time.time
    config = run_config()
    seconds_left = SlurmEnvironment.seconds_left

    def then_jump(environment):
        left = seconds_left(environment)
        monkeypatch.setattr(time, "time", lambda: now() + 7200)
        return left

    monkeypatch.setattr(SlurmEnvironment, "seconds_left", then_jump)
    assert fedhpc("run", config)[0] == 0


def test_before_the_first_round_there_is_nothing_to_lose(run_config, fedhpc, stop_after):
    config = run_config()
    stop_after(1)
    status, _, err = fedhpc("run", config)
    assert status == EXIT_STOPPED
    assert "nothing to save" in err
    assert fedhpc("run", config)[0] == 0
