"""An experiment's cells: what they are, that each is run once and to its end, and the tables."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from tiny import final_prompts

from fedhpc.errors import EXIT_STOPPED, ConfigError
from fedhpc.report import RunFiles
from fedhpc.sweep.experiment import load_experiment
from fedhpc.sweep.results import curve, results
from fedhpc.sweep.standing import standing

GRID = {
    "server.method": ["fedavg", "fedpeptao"],
    "layers": {"all": {"selection.strategy": "all"}, "half": {"selection": {"strategy": "first", "ratio": 0.5}}},
    "seed": [1, 2, 3],
}
TIMEOUT_S = 120


@pytest.fixture(scope="module")
def write(world, tmp_path_factory):
    """Write an experiment file over the tiny world; its path. Every cell goes to `out` beside it."""

    def write(grid=GRID, **others):
        folder = tmp_path_factory.mktemp("experiment")
        values = {"base": str(world), "out": str(folder / "out"), "set": {"trace": False}, "grid": grid, **others}
        path = folder / "experiment.yaml"
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        return path

    return write


def start(path, *options):
    command = [sys.executable, "-m", "fedhpc", "sweep", path, *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def end(process):
    out, err = process.communicate(timeout=TIMEOUT_S)
    return process.returncode, out, err


def wait_until(happened):
    until = time.monotonic() + TIMEOUT_S
    while not happened():
        assert time.monotonic() < until
        time.sleep(0.005)


def states(path):
    experiment = load_experiment(path)
    return [standing(experiment, cell) for cell in experiment.cells]


def table(path):
    """Everything but the seconds."""
    rows = list(csv.DictReader((path.parent / "out/results.csv").open()))
    assert all(float(row.pop("seconds")) > 0 for row in rows if row["rounds"] != "0")
    return rows


@pytest.fixture(scope="module")
def undisturbed(write):
    """A sweep of 12 cells that ran from start to end, two at once; not to be changed."""
    path = write()
    process = start(path, "--jobs", "2")
    yield path, process
    process.wait(TIMEOUT_S)


@pytest.fixture(scope="module")
def finished(undisturbed):
    """The same, ended."""
    path, process = undisturbed
    status, out, err = end(process)
    assert status == 0, out + err
    return path


def test_interrupted_twice_it_ends_with_the_tables_of_an_uninterrupted_one(undisturbed, write):
    path = write()
    cells = load_experiment(path).cells
    for interruption, number in ((signal.SIGTERM, 2), (signal.SIGINT, 7)):
        process = start(path)
        wait_until(RunFiles(cells[number].run_dir).rounds_recorded)
        process.send_signal(interruption)
        status, out, _ = end(process)
        assert status == EXIT_STOPPED
        done = [state.done for state in states(path)]
        assert number <= sum(done) < 12
        assert done == sorted(done, reverse=True)
        stopped = states(path)[sum(done)]
    status, out, err = end(start(path, "--jobs", "2"))
    assert (status, err) == (0, "")
    assert f"12 cells, {sum(done)} of them done" in out
    assert f"cell {sum(done)} {cells[sum(done)].name}: " + (
        f"goes on after round {stopped.completed}," if stopped.completed else "begins,"
    ) in out
    reference, process = undisturbed
    assert end(process)[0] == 0
    assert table(path) == table(reference)
    assert len(table(path)) == 12
    for ours, theirs in zip(cells, load_experiment(reference).cells, strict=True):
        assert final_prompts(ours.run_dir / "config.yaml") == final_prompts(theirs.run_dir / "config.yaml")
