"""A host's cable is pulled in the middle of a round: the job ends in bounded time, names the host, and can go on.

By default during local training; FEDHPC_TEST_ALL=1 tries every phase.
"""

import os
import sys

import pytest
import tiny
from hosts import ROOT
from strike import Job

from fedhpc.commands import cli
from fedhpc.errors import EXIT_STOPPED, EXIT_USER_ERROR

PHASES = ("training", "broadcast", "gather", "evaluation", "checkpoint")
TRIED = PHASES if "FEDHPC_TEST_ALL" in os.environ else PHASES[:1]
START_UP_S = 120
END_S = 40
"""From the cut to the end: the timeout of pause.py, 15 s until the launcher is ended, and a busy machine."""


@pytest.fixture(scope="module")
def write_config(world, tmp_path_factory):
    def write(run):
        changes = {"federation__num_devices": 6, "trace": False, "exchange__timeout_s": START_UP_S}
        return tiny.write_config(world, tmp_path_factory.mktemp("cut"), run, checkpoint__every=1, **changes)

    return write


@pytest.fixture(scope="module")
def alone(write_config):
    """The final prompts of one process that nobody disturbs."""
    config = write_config("alone")
    assert cli.main(["run", str(config)]) == 0
    return tiny.final_prompts(config)


@pytest.mark.parametrize("phase", TRIED)
def test_a_host_that_is_cut_off_ends_the_job(hosts, write_config, alone, tmp_path, phase):
    config, paused = write_config("run"), tmp_path / "paused"
    program = [ROOT / "tests/hosts/pause.py", phase, tmp_path, "run", config]
    with Job(3, *program, output=tmp_path / "output.txt", hosts=hosts) as job:
        assert job.until(paused.exists, START_UP_S), job.text()
        hosts.cut("node3")
        try:
            (tmp_path / "go").touch()
            status = job.wait(END_S)
            assert status not in (None, 0, EXIT_USER_ERROR, EXIT_STOPPED), job.text()
            assert "on node3 has not been heard of" in job.text()
        finally:
            hosts.restore("node3")
        assert not job.left(END_S)
    hosts.run("node1", sys.executable, "-m", "fedhpc", "run", config)
    assert tiny.final_prompts(config) == alone
