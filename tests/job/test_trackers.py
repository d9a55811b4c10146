"""Trackers: beside the run, whatever they do; and in those that fedhpc brings one curve, whatever stops the run."""

import shutil
import subprocess
import sys
import threading
import time
from importlib.util import find_spec

import pytest
from tiny import final_tensors, metrics, run_dir

from fedhpc.config import Config
from fedhpc.errors import ConfigError
from fedhpc.job import tracker as trackers
from fedhpc.job import tracking
from fedhpc.job.run_files import RunFiles
from fedhpc.job.tracker import Tracker, Trackers, any_at_work, make_trackers
from fedhpc.job.tracking import hyper_parameters, numbers
from fedhpc.registry import TRACKERS

SHIPPED = ("mlflow", "tensorboard", "trackio", "wandb")
READ_BACK = [kind for kind in ("tensorboard", "mlflow") if find_spec(kind)]


def config(run_dir="r", *entries, **changes):
    """A configuration with these trackers."""
    values = {"run_dir": str(run_dir), "model": {"name": "m"}, "data": {"path": "d"}, "trackers": list(entries)}
    return Config.model_validate(values | changes)


def line(t, **more):
    """A line of metrics.jsonl."""
    return {"round": t, "loss": 1 / (t + 1), "accuracy": None, "seconds": {"local": 2.0}, "devices": [4], **more}


def tensorboard_curves(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "trackers/tensorboard")).Reload()
    about = events.PluginTagToContent("hparams")
    curves = {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
    points = sum(len(events.Scalars(tag)) for tag in curves)
    return curves, points, "".join(map(str, about.values()))


def mlflow_curves(folder):
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=str(folder / "trackers/mlflow"))
    (run,) = client.search_runs([client.get_experiment_by_name("fedhpc").experiment_id])
    history = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
    curves = {name: {point.step: point.value for point in points} for name, points in history.items()}
    return curves, sum(map(len, history.values())), f"{run.data.params} {run.info.status}"


CURVES = {"tensorboard": tensorboard_curves, "mlflow": mlflow_curves}


@pytest.fixture
def probes():
    """Register trackers for one test."""
    before = dict(TRACKERS._parts)
    yield TRACKERS.register
    TRACKERS._parts = before


def test_the_numbers_of_a_round():
    assert numbers(line(3)) == {"loss": 0.25, "seconds/local": 2.0}


@pytest.mark.parametrize("kind", READ_BACK)
def test_one_curve_after_a_kill_and_an_older_checkpoint(kind, tmp_path):
    run = config(tmp_path, {"kind": kind})
    (killed,) = make_trackers(run)
    killed.check_ready(tmp_path)
    killed.begin(run, tmp_path, [])
    for t in range(4):
        killed.record(line(t))
    (resumed,) = make_trackers(run)
    resumed.begin(run, tmp_path, [line(0), line(1)])
    for t in range(2, 6):
        resumed.record(line(t, accuracy=0.5) if t == 3 else line(t))
    resumed.end()
    curves, points, about = CURVES[kind](tmp_path)
    assert curves["loss"] == pytest.approx({t: 1 / (t + 1) for t in range(6)})
    assert curves["accuracy"] == {3: 0.5}
    assert points == 6 + 1 + 6
    assert "federation.alpha" in about


@pytest.mark.skipif(not READ_BACK, reason="neither tensorboard nor mlflow is installed")
def test_a_run_stopped_and_resumed_has_one_curve_and_the_same_bits(fedhpc, run_config, monkeypatch):
    monkeypatch.setattr(trackers, "END_S", 60.0)
    plain = run_config("plain", checkpoint__every=1)
    assert fedhpc("run", plain)[0] == 0
    tracked = run_config("tracked", checkpoint__every=1, trackers=[{"kind": kind} for kind in READ_BACK])
    assert fedhpc("run", tracked, "--set", "federation.rounds=2")[0] == 0
    shutil.rmtree(run_dir(tracked) / "checkpoints/round_000002")
    assert fedhpc("run", tracked)[0] == 0
    assert final_tensors(tracked) == final_tensors(plain)
    assert [record["round"] for record in metrics(tracked)] == [0, 1, 1, 2]
    for kind in READ_BACK:
        curves, points, about = CURVES[kind](run_dir(tracked))
        assert curves["loss"] == pytest.approx({record["round"]: record["loss"] for record in metrics(plain)})
        assert points == sum(map(len, curves.values()))
        assert "federation.alpha" in about


def test_a_tracker_has_a_thread_of_its_own_and_learns_how_the_run_ends(probes, tmp_path):
    seen = []

    @probes("probe")
    class Probe(Tracker):
        def begin(self, run, run_dir, earlier):
            seen.append(("begin", run_dir, threading.current_thread()))

        def record(self, metrics):
            seen.append((metrics["round"], None, threading.current_thread()))

        def end(self):
            seen.append((self.ending, None, threading.current_thread()))

    run = config(tmp_path, {"kind": "probe"})
    every = Trackers(run)
    every.begin(run, tmp_path, [])
    every.record(line(0))
    every.record(line(1))
    every.end("stopped")
    assert [what for what, _, _ in seen] == ["begin", 0, 1, "stopped"]
    assert len({thread for _, _, thread in seen} | {threading.main_thread()}) == 2
    assert not any_at_work()


def test_what_would_undo_privacy_is_not_tracked(probes, tmp_path):
    """The seed, from which the noise follows, and seconds, which depend on who takes part."""
    seen = []

    @probes("seeing")
    class Seeing(Tracker):
        def begin(self, run, run_dir, earlier):
            seen.extend(earlier)

        def record(self, metrics):
            seen.append(metrics)

    for privacy, left_out in (({}, set()), ({"clip": 1.0, "noise": 1.0}, {"seconds"})):
        more = {"exchange": {"mode": "reduce"}, "server": {"method": "fedavg", "weights": "uniform"}}
        more |= {"selection": {"strategy": "all"}, "privacy": privacy}
        run = config(tmp_path, {"kind": "seeing"}, **more)
        every = Trackers(run)
        every.begin(run, tmp_path, [line(0)])
        every.record(line(1))
        every.end("finished")
        assert [line(0).keys() - metrics.keys() for metrics in seen[-2:]] == [left_out] * 2
        assert ("seed" in hyper_parameters(run)) is not run.privacy.is_on


def test_a_tracker_that_hangs_delays_nothing_and_costs_one_warning(probes, monkeypatch, reports, tmp_path):
    monkeypatch.setattr(trackers, "END_S", 0.2)
    monkeypatch.setattr(trackers, "MOST_WAITING", 2)
    release = threading.Event()

    @probes("hanging")
    class Hanging(Tracker):
        def record(self, metrics):
            release.wait()

    run = config(tmp_path, {"kind": "hanging"})
    every = Trackers(run)
    start = time.monotonic()
    every.begin(run, tmp_path, [])
    for t in range(10):
        every.record(line(t))
    every.end("finished")
    try:
        assert time.monotonic() - start < 2
        assert any_at_work()
        assert reports == ["tracker hanging is 2 rounds behind; rounds that find no place are left out"]
    finally:
        release.set()
    until = time.monotonic() + 10
    while any_at_work() and time.monotonic() < until:
        time.sleep(0.01)
    assert not any_at_work()  # though its last call found no place either


def test_a_tracker_that_fails_ends_alone_with_one_warning(probes, reports, tmp_path):
    seen = []

    @probes("failing")
    class Failing(Tracker):
        def record(self, metrics):
            raise OSError("the server is gone")

    @probes("patient")
    class Patient(Tracker):
        def record(self, metrics):
            seen.append(metrics["round"])

    run = config(tmp_path, {"kind": "failing"}, {"kind": "patient"})
    every = Trackers(run)
    every.begin(run, tmp_path, [])
    for t in range(3):
        every.record(line(t))
    every.end("finished")
    assert seen == [0, 1, 2]
    (said,) = reports
    assert said.startswith("tracker failing has failed and sees no more rounds: OSError: the server is gone (")


@pytest.mark.parametrize("kind", SHIPPED)
def test_a_tracker_without_its_package_names_the_extra(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    (tracker,) = make_trackers(config(tmp_path, {"kind": kind}))
    with pytest.raises(ConfigError, match=rf"trackers: {kind} needs a package.*pip install 'fedhpc\[{kind}\]'"):
        tracker.check_ready(tmp_path)


def test_a_folder_with_the_name_of_a_package_is_none(tmp_path, monkeypatch):
    (tmp_path / "such_a_tracker").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="needs a package"):
        tracking.load_package("such_a_tracker")


@pytest.mark.parametrize(
    "entry",
    [
        {"kind": "tensorboard", "folder": "{locked}/events"},
        {"kind": "mlflow", "tracking_uri": "file:{locked}/files"},
    ],
    ids=lambda entry: entry["kind"],
)
def test_a_folder_that_cannot_be_written_is_refused(entry, tmp_path, unprivileged, monkeypatch):
    module = sys.modules[TRACKERS[entry["kind"]].__module__]
    monkeypatch.setattr(module, "load_package", lambda *names: None)
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    (tracker,) = make_trackers(config(tmp_path, {k: v.format(locked=locked) for k, v in entry.items()}))
    with pytest.raises(
        ConfigError, match=f"trackers: {entry['kind']}: {locked}/.* cannot be written: Permission denied"
    ):
        tracker.check_ready(tmp_path)


def test_wandb_online_needs_a_key_and_an_answer(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not among the packages that the tests install")
    monkeypatch.setattr(sys.modules[TRACKERS["wandb"].__module__], "ANSWER_S", 0.5)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    (tracker,) = make_trackers(config(tmp_path, {"kind": "wandb", "mode": "online"}))
    with pytest.raises(ConfigError, match=r"needs a key: .* or set mode: offline"):
        tracker.check_ready(tmp_path)
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    with pytest.raises(ConfigError, match=r"http://127.0.0.1:9 does not answer within .* or set mode: offline"):
        tracker.check_ready(tmp_path)


def test_an_unknown_tracker_is_refused_with_those_that_there_are():
    with pytest.raises(ValueError, match="'wand' is no tracker; kind is one of mlflow, tensorboard, trackio, wandb"):
        config("r", {"kind": "wand"})


def test_trackers_do_not_belong_to_the_identity_of_a_run():
    assert config("r", {"kind": "mlflow"}).sha256 == config("r").sha256


def test_a_run_begun_anew_is_another_one_to_a_tracker(tmp_path):
    first = tracking.remembered(tmp_path, "probe", lambda: "first")
    assert tracking.remembered(tmp_path, "probe", lambda: "second") == first
    RunFiles(tmp_path).begin_anew()
    assert (tmp_path / "trackers.1/probe.id").read_text() == first
    assert tracking.remembered(tmp_path, "probe", lambda: "second") == "second"


def test_no_package_of_a_tracker_is_loaded_unless_a_run_has_it():
    program = (
        f"import sys; from fedhpc.registry import TRACKERS; print(*TRACKERS); print({{*sys.modules}} & {{*{SHIPPED}}})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [" ".join(SHIPPED), "set()"]
