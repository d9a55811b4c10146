"""A sweep whose cells are several ranks each."""

import subprocess
import sys
import time

import pytest
import yaml
from launch import MPIRUN, environment

from fedhpc.commands.sweep.experiment import load_experiment
from fedhpc.errors import EXIT_STOPPED
from fedhpc.job.run_files import RunFiles

pytestmark = pytest.mark.skipif(MPIRUN is None, reason="no mpirun")
TIMEOUT_S = 120


def test_a_stop_reaches_the_ranks_of_a_cell_which_then_goes_on(world, tmp_path):
    path = tmp_path / "experiment.yaml"
    experiment = {"base": str(world), "out": str(tmp_path / "out"), "grid": {"federation.rounds": [8]}}
    path.write_text(yaml.safe_dump(experiment | {"launch": f"{MPIRUN} -np 2"}))
    command = [sys.executable, "-m", "fedhpc", "sweep", path]
    run_dir = load_experiment(path).cells[0].run_dir
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True)
    until = time.monotonic() + TIMEOUT_S
    while not RunFiles(run_dir).rounds_recorded():
        assert time.monotonic() < until
        time.sleep(0.005)
    process.terminate()
    out, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == EXIT_STOPPED, out
    assert "stopped after" in out
    assert "rank 0/2" in (run_dir / "log.txt").read_text()
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stdout
    assert "goes on after round" in done.stdout
    (row,) = (tmp_path / "out/results.csv").read_text().splitlines()[1:]
    rounds, _, _, _, moved, *_ = row.split(",")[1:]
    assert (rounds, int(moved) > 0) == ("8", True)
