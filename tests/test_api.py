"""The public interface: its names, the examples in its docstrings, runs from Python, checks for parts of one's own."""

import doctest
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from mpi.launch import MPIRUN, mpirun
from threadpoolctl import threadpool_info
from tiny import final_tensors, write_config, write_world

import fedhpc
from fedhpc.commands import cli
from fedhpc.exchange import LocalExchange
from fedhpc.exchange.encodings.topk import TopK
from fedhpc.job.log import log
from fedhpc.job.progress import Progress
from fedhpc.job.stopping import STOP_SIGNALS
from fedhpc.methods import FedAvg
from fedhpc.registry import ENCODINGS, METHODS, METRICS, PARTITIONS, SECTIONS, TUNINGS
from fedhpc.testing import check_encoding, check_method, check_partition

NAMES = [
    *("Attack", "AttackConfig", "BadDevicesConfig"),
    *("Config", "ConfigError", "Encoding", "ExchangeConfig", "FederationConfig", "GenerationMetric"),
    *("Layout", "Method", "MethodConfig"),
    *("Metric", "Partitioner", "Population", "RoundUploads", "RunResult", "SelectionConfig", "ServerState", "Strategy"),
    *("SummedMethod", "Sums", "Tracker", "TrackerConfig", "Tuning", "TuningConfig", "UserError", "load_config"),
    *(
        "methods",
        "register_attack",
        "register_encoding",
        "register_generation_metric",
        "register_method",
        "register_metric",
    ),
    *("register_partition", "register_strategy", "register_tracker", "register_tuning", "run", "testing", "tuning"),
]
SMALL = {"federation": {"num_devices": 6, "sample_rate": 0.5, "rounds": 2}, "selection": {"strategy": "all"}}
SOURCES_AFTER = """
import sys
before = {*sys.modules}
def others():
    return {name.partition(".")[0] for name in {*sys.modules} - before} - sys.stdlib_module_names
import fedhpc
print(sorted(others()))
fedhpc.load_config(sys.argv[1])
print(sorted(others() & {"torch", "transformers", "datasets", "h5py", "mpi4py"}))
"""
RANKS = """
import sys
import fedhpc

bad, *good = sys.argv[1:]
try:
    fedhpc.run(fedhpc.load_config(bad))
except fedhpc.UserError as error:
    print("refused:", error, flush=True)
for path in good:
    result = fedhpc.run(fedhpc.load_config(path))
    print("result:", result and result.sha256, flush=True)
"""
CLASS = """
@fedhpc.register_method("mine")
class Mine(fedhpc.methods.FedAvg):
    def apply(self, state, sums, uploads):
        return state + 1
"""
SOURCE = "import fedhpc, fedhpc.registry\n{}\nprint(fedhpc.registry.source_sha256([Mine], []))\n"
CELL = """
import linecache, sys
for number, text in enumerate(sys.argv[1:]):
    linecache.cache[f"cell {number}"] = (len(text), None, text.splitlines(keepends=True), f"cell {number}")
    exec(compile(text, f"cell {number}", "exec"))
"""


@pytest.fixture(autouse=True)
def parts_of_fedhpc_alone(monkeypatch):
    """What a test registers is gone after it."""
    for registry in (METHODS, ENCODINGS, PARTITIONS):
        monkeypatch.setattr(registry, "_parts", dict(registry.items()))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    path = write_world(tmp_path_factory.mktemp("api"), num_train=60, num_validation=12)
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | SMALL | {"trace": False}))
    return path


@pytest.fixture(scope="module")
def by_command(world):
    """The same job as `fedhpc run` does it."""
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    handlers, level, propagate = log.handlers[:], log.level, log.propagate
    config = write_config(world, world.parent, "by-command")
    assert cli.main(["run", str(config)]) == 0
    log.handlers[:], log.propagate = handlers, propagate
    log.setLevel(level)
    for number, handler in zip(STOP_SIGNALS, before, strict=True):
        signal.signal(number, handler)
    return config


@pytest.fixture
def job(world, tmp_path):
    """A job in a run directory of its own, with changes."""

    def write(run="run", **changes):
        return fedhpc.load_config(write_config(world, tmp_path, run, **changes))

    return write


def test_the_public_names():
    assert fedhpc.__all__ == NAMES
    assert sorted(dir(fedhpc)) == sorted([*NAMES, "__version__"])
    assert [name for name in NAMES if not getattr(fedhpc, name).__doc__] == []
    for registry, module in ((METHODS, fedhpc.methods), (TUNINGS, fedhpc.tuning)):
        assert {part.__name__ for _, part in registry.items()} <= {*module.__all__}
    with pytest.raises(AttributeError, match="no attribute 'Run'"):
        _ = fedhpc.Run


def test_what_is_imported_when(world):
    done = subprocess.run(
        [sys.executable, "-c", SOURCES_AFTER, world], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.splitlines() == ["['fedhpc']", "[]"]


def test_examples_in_docstrings(world, tmp_path, monkeypatch):
    write_config(world, tmp_path, "reviews")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Progress, "update", lambda *_: None)  # seconds, which no example can show
    names = {"fedhpc": fedhpc, "Mine": register(Momentum, fedhpc.register_method)}
    for registry in (*SECTIONS, METRICS):
        monkeypatch.setattr(registry, "_parts", dict(registry._parts))
    finder, runner, seen = doctest.DocTestFinder(), doctest.DocTestRunner(), set()
    for public in ["load_config", "run", *NAMES]:
        for test in finder.find(getattr(fedhpc, public), public, globs={}):
            if test.examples and test.name not in seen:
                test.globs = names  # what one example makes is there for the next
                runner.run(test, clear_globs=False)
                seen.add(test.name)
    assert runner.failures == 0
    assert {"load_config", "run", "RunResult.metrics", "testing.check_method", "register_method"} <= seen


def test_runs_in_one_process_and_by_the_command_have_the_same_bits(job, by_command):
    one, two = (fedhpc.run(job(name)) for name in ("one", "two"))
    assert one.finished
    assert one.sha256 == two.sha256 == fedhpc.RunResult(by_command.parent / "by-command").sha256
    assert [final_tensors(two.run_dir.with_suffix(".yaml"))] == [final_tensors(by_command)]
    lines = (one.run_dir / "metrics.jsonl").read_text().splitlines()
    assert one.metrics == [json.loads(line) for line in lines]
    assert len(one.metrics) == 2


def standing():
    """What a program that calls fedhpc has set in its process."""
    threads = [(library["filepath"], library["num_threads"]) for library in threadpool_info()]
    signals = [signal.getsignal(number) for number in STOP_SIGNALS]
    return torch.get_num_threads(), threads, log.handlers[:], log.level, log.propagate, signals


@pytest.fixture
def own_standing():
    """As a program may have it, otherwise than a run does."""
    before, threads = signal.signal(signal.SIGUSR1, lambda *_: None), torch.get_num_threads()
    torch.set_num_threads(2)
    yield standing()
    torch.set_num_threads(threads)
    signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("handle_signals", [False, True])
def test_a_run_leaves_the_process_as_it_was(job, own_standing, handle_signals):
    assert fedhpc.run(job(), handle_signals=handle_signals).finished
    assert standing() == own_standing


@pytest.mark.parametrize("handle_signals", [False, True])
def test_what_is_wrong_is_raised_and_the_process_goes_on(job, own_standing, handle_signals, tmp_path):
    config = job(data__path=str(tmp_path / "nothing"))
    with pytest.raises(fedhpc.UserError, match="nothing"):
        fedhpc.run(config, handle_signals=handle_signals)
    assert standing() == own_standing
    with pytest.raises(fedhpc.UserError, match="require"):
        fedhpc.run(job(), resume="require")


def test_a_signal_stops_a_run_that_goes_on_when_it_is_called_again(job, by_command, monkeypatch):
    steps, beat = [], LocalExchange.beat

    def striking_beat(exchange, activity):
        steps.append(activity)
        if len(steps) == 5:
            os.kill(os.getpid(), signal.SIGUSR1)
        beat(exchange, activity)

    monkeypatch.setattr(LocalExchange, "beat", striking_beat)
    stopped = fedhpc.run(job(), handle_signals=True)
    assert not stopped.finished
    assert len(stopped.metrics) < 2
    gone_on = fedhpc.run(job(), resume="require")
    assert gone_on.finished
    assert gone_on.sha256 == fedhpc.RunResult(by_command.parent / "by-command").sha256


@pytest.mark.skipif(MPIRUN is None, reason="no mpirun beside this Python or on PATH")
def test_ranks(world, by_command, tmp_path):
    script = tmp_path / "study.py"
    script.write_text(RANKS)
    bad = write_config(world, tmp_path, "bad", data__path=str(tmp_path / "nothing"))
    done = mpirun(3, script, bad, *(write_config(world, tmp_path, name) for name in ("one", "two")))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len({line for line in lines if line.startswith("refused:")}) == 1
    sha256 = fedhpc.RunResult(by_command.parent / "by-command").sha256
    assert sorted(line for line in lines if line.startswith("result:")) == sorted(
        [f"result: {sha256}", "result: None", "result: None"] * 2
    )


def test_a_class_in_a_notebook_counts_by_its_text(tmp_path):
    def sources(*arguments):
        return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True).stdout

    (tmp_path / "script.py").write_text(SOURCE.format(CLASS))
    of_script = sources(tmp_path / "script.py")
    assert "Mine" in of_script
    assert sources("-c", CELL, SOURCE.format(CLASS)) == of_script
    assert sources("-c", CELL, SOURCE.format(f"1 + 1\n{CLASS}\n2 + 2")) == of_script
    first, again = sources("-c", CELL, *(SOURCE.format(CLASS.replace("+ 1", by)) for by in ("+ 1", "+ 2"))).splitlines()
    assert first == of_script.strip() != again


class Momentum(FedAvg):
    """What docs/own-method.md has."""

    class Config(fedhpc.MethodConfig):
        rho: float = 0.1

    def init(self, params):
        return fedhpc.ServerState(round=0, params=params, vectors={"step": np.zeros_like(params)})

    def apply(self, state, sums, uploads):
        step = self.config.rho * state.vectors["step"].astype(np.float64) + (sums.mean - state.params)
        return replace(
            state, params=(state.params + step).astype(np.float32), vectors={"step": step.astype(np.float32)}
        )


def register(part, by):
    return by("of this test")(part)


SHIPPED = [
    *((METHODS, check_method, name, {}) for name in METHODS if name != "fedpeptao"),
    *((METHODS, check_method, "fedpeptao", {"variant": name}) for name in ("drift_corrected", "paper", "released")),
    (METHODS, check_method, "fedpeptao", {"control_variates": False}),
    *((ENCODINGS, check_encoding, "dense", {"dtype": name}) for name in ("float32", "float16", "bfloat16")),
    *((ENCODINGS, check_encoding, "topk", keys) for keys in ({}, {"share": 0.5})),
    *((PARTITIONS, check_partition, name, {}) for name in PARTITIONS),
]


@pytest.mark.parametrize(
    ("registry", "check", "name", "keys"), SHIPPED, ids=lambda value: getattr(value, "__name__", str(value))
)
def test_what_fedhpc_brings_passes_the_checks(registry, check, name, keys):
    check(registry[name], **keys)


class ChangesState(FedAvg):
    def apply(self, state, sums, uploads):
        state.params[:] = sums.mean
        return state


class ChangesUploads(FedAvg):
    def change(self, start, params, control, *, num_steps, learning_rate, memory=None):
        params *= 2
        return params, None


class Counts(FedAvg):
    calls = 0

    def apply(self, state, sums, uploads):
        self.calls += 1
        return replace(state, params=(sums.mean + self.calls).astype(np.float32))


class Remembers(FedAvg):
    def __init__(self, config, population):
        super().__init__(config, population)
        self.earlier = {}

    def update(self, state, uploads):
        new = super().update(state, uploads)
        self.earlier[new.round] = new.params
        return replace(new, params=new.params + self.earlier.get(state.round, np.float32(0)))


class OfUnitLength(FedAvg):
    def apply(self, state, sums, uploads):
        length = np.linalg.norm(sums.mean) if sums.mean.size else 1.0
        return replace(state, params=(sums.mean / length).astype(np.float32))


class GoesToInfinity(FedAvg):
    def apply(self, state, sums, uploads):
        return replace(state, params=np.full_like(state.params, np.inf))


class Forgets(TopK):
    def encode(self, *args, **kwargs):
        return super().encode(*args, **kwargs)[0], {}


class ChangesKept(TopK):
    def encode(self, params, start, kept, **kwargs):
        payload, new = super().encode(params, start, kept, **kwargs)
        if kept:
            kept["residual"][:] = new["residual"]
        return payload, new


class LongerThanItSays(TopK):
    def length(self, size):
        return super().length(size) - 1


class AllOnOne(fedhpc.Partitioner):
    def owners(self, labels, num_classes):
        return np.zeros(len(labels), np.int64)


class OneDeviceMore(fedhpc.Partitioner):
    def owners(self, labels, num_classes):
        return np.arange(len(labels)) % (self.config.num_devices + 1)


class ForgetsSome(fedhpc.Partitioner):
    def owners(self, labels, num_classes):
        return np.arange(len(labels) - 1) % self.config.num_devices


class FromNoSeed(fedhpc.Partitioner):
    def owners(self, labels, num_classes):
        return np.random.default_rng().permutation(np.arange(len(labels)) % self.config.num_devices)


BROKEN = [
    (check_method, fedhpc.register_method, ChangesState, "changed the state that it was given"),
    (check_method, fedhpc.register_method, ChangesUploads, "changed the uploads that it was given"),
    (check_method, fedhpc.register_method, Counts, "the same state and uploads led to another state"),
    (check_method, fedhpc.register_method, Remembers, "went on from a checkpoint led to another state"),
    (check_method, fedhpc.register_method, OfUnitLength, "must depend on that element alone"),
    (check_method, fedhpc.register_method, GoesToInfinity, "params is not finite"),
    (check_encoding, fedhpc.register_encoding, Forgets, "do not add up to the changes"),
    (check_encoding, fedhpc.register_encoding, ChangesKept, "changed what the device keeps"),
    (check_encoding, fedhpc.register_encoding, LongerThanItSays, "but length and dtype say"),
    (check_partition, fedhpc.register_partition, AllOnOne, r"leaves devices \[1, 2, 3, 4, 5\] without an example"),
    (check_partition, fedhpc.register_partition, OneDeviceMore, "a device from 0 to 6; found 500 from 0 to 7"),
    (check_partition, fedhpc.register_partition, ForgetsSome, "each of the 500 examples a device"),
    (check_partition, fedhpc.register_partition, FromNoSeed, "the same seed led to another partition"),
]


@pytest.mark.parametrize(
    ("check", "register_it", "part", "words"), BROKEN, ids=lambda value: getattr(value, "__name__", str(value))
)
def test_what_breaks_a_rule_is_refused_with_the_reason(check, register_it, part, words):
    with pytest.raises(AssertionError, match=words):
        check(register(part, register_it))


def test_a_part_that_is_not_registered_is_refused():
    with pytest.raises(AssertionError, match=r"Momentum is not registered as a server method"):
        check_method(Momentum)
