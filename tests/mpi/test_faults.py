"""Ranks that are stopped, hung or killed: the job ends in bounded time and goes on from there to the same bits."""

import re
import signal
import time
from pathlib import Path

import pytest
import yaml
from launch import MPIRUN, WITH_ULFM, has_ulfm, mpirun
from strike import CheckpointFiles, Job
from tiny import final_prompts, metrics, run_dir

from fedhpc.checkpoint.files import verify
from fedhpc.checkpoint.store import Checkpoints
from fedhpc.commands import cli
from fedhpc.errors import EXIT_STOPPED, EXIT_USER_ERROR

pytestmark = pytest.mark.skipif(MPIRUN is None, reason="no mpirun beside this Python or on PATH")

ROUNDS, START_UP_S, END_S = 40, 120, 60
TIMEOUT_S = 10
"""For the runs with a hung rank. On a busy machine the ranks' set-ups are that far apart."""


def write_config(world, folder):
    config = yaml.safe_load(world.read_text())
    config |= {"run_dir": str(folder / "run"), "trace": False}
    config["federation"]["rounds"] = ROUNDS
    config["device"]["reset_moments"] = False
    config["evaluate"]["every"] = 20
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def strike_in_round(job, config, rank, number, round_index, *, during_checkpoint=False):
    """Send a rank a signal once a round is done; the status and seconds with which mpirun ends."""
    process, path = job.find(rank), run_dir(config) / "metrics.jsonl"
    assert job.until(lambda: path.exists() and path.read_bytes().count(b"\n") > round_index, START_UP_S), job.text()
    if during_checkpoint:
        files = CheckpointFiles(run_dir(config))
        assert job.until(files.count_new, END_S)
    assert job.strike(process, number)
    struck = time.monotonic()
    status = job.wait(END_S)
    assert status is not None, job.text()
    assert not job.left()
    return status, time.monotonic() - struck


@pytest.fixture(scope="module")
def expected(world, tmp_path_factory):
    """The final prompts of the run that nothing disturbs, in one process."""
    config = write_config(world, tmp_path_factory.mktemp("undisturbed"))
    assert cli.main(["run", str(config)]) == 0
    return final_prompts(config)


@pytest.fixture
def config(world, tmp_path):
    """Of a run that lasts some seconds after its start."""
    return write_config(world, tmp_path)


@pytest.fixture
def start(tmp_path):
    """Start a run on so many ranks; none of its processes outlives the test."""
    jobs = []

    def on_ranks(num_ranks, config, *settings, options=()):
        command = ["-m", "fedhpc", "run", config, *(word for setting in settings for word in ("--set", setting))]
        jobs.append(Job(num_ranks, *command, output=tmp_path / f"output_{len(jobs)}.txt", options=options))
        return jobs[-1]

    yield on_ranks
    for job in jobs:
        job.kill()


def test_a_run_that_is_stopped_and_killed_goes_on_to_the_same_bits(start, config, expected):
    stopped = start(3, config)
    assert strike_in_round(stopped, config, 2, signal.SIGUSR1, 4)[0] == EXIT_STOPPED
    assert re.search(r"stopped on request \(SIGUSR1 at rank 2 \(.+\)\), .+ written", stopped.text())
    stopped = start(2, config)
    assert strike_in_round(stopped, config, 0, signal.SIGTERM, 10)[0] == EXIT_STOPPED
    assert "stopped on request (SIGTERM)" in stopped.text()
    assert re.search(r"resuming (within|after) round \d+ of \d+: .+ 2 ranks", stopped.text())
    killed = start(4, config)
    status, _ = strike_in_round(killed, config, 0, signal.SIGKILL, 20, during_checkpoint=True)
    assert status not in (0, EXIT_USER_ERROR, EXIT_STOPPED)
    checkpoints = Checkpoints(run_dir(config))
    verify(checkpoints.path(checkpoints.positions()[0]))
    assert start(2, config).wait(START_UP_S) == 0
    assert final_prompts(config) == expected
    assert {record["round"] for record in metrics(config)} == set(range(ROUNDS))


@pytest.mark.parametrize("rank", [2, 0])
def test_a_rank_that_hangs_is_named_and_ends_the_job(start, config, rank):
    job = start(3, config, f"exchange.timeout_s={TIMEOUT_S}")
    status, seconds = strike_in_round(job, config, rank, signal.SIGSTOP, 4)
    assert status not in (0, EXIT_USER_ERROR, EXIT_STOPPED)
    assert seconds < TIMEOUT_S + 20
    words = r"rank (\d) on \S+ has not been heard of for \d+ s \(exchange.timeout_s: 10\); last known: \w+"
    assert set(re.findall(words, job.text())) == {str(rank)}, job.text()


@pytest.fixture(scope="module")
def ulfm():
    if not has_ulfm():
        pytest.skip("this mpirun cannot keep the other ranks alive: no --with-ft ulfm")


def test_with_ulfm_the_surviving_ranks_go_on_to_the_same_bits(ulfm, start, config, expected):
    job = start(4, config, "exchange.on_rank_failure=continue", options=WITH_ULFM)
    assert strike_in_round(job, config, 2, signal.SIGKILL, 4)[0] == 0, job.text()
    assert "going on from the last checkpoint with 3 ranks" in job.text()
    assert final_prompts(config) == expected


def test_with_ulfm_a_second_loss_during_the_repair_is_repaired_too(ulfm):
    done = mpirun(5, Path(__file__).parent / "lose_two.py", options=WITH_ULFM, timeout_s=60)
    assert "two have gone on" in done.stdout, done.stderr
