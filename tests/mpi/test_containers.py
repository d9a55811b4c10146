"""Ranks in containers, which are made of namespaces here: the right bytes, over memory that is shared or else sent.

By default each rank in one of its own; FEDHPC_TEST_ALL=1 tries other ways, too.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from launch import MPIRUN, command, environment

from fedhpc import exchange
from fedhpc.errors import UserError
from fedhpc.exchange import NO_SHARED_MEMORY, TRANSPORTS, prepare_mpi

ALL = "FEDHPC_TEST_ALL" in os.environ
PROGRAM = Path(__file__).parent / "contained.py"
PROCESSES = ("unshare", "--pid", "--ipc", "--mount", "--fork", "--kill-child", "--mount-proc")
USERS = ("unshare", "--user", "--map-root-user")
OWN_MEMORY = ("sh", "-c", 'mount -t tmpfs tmpfs /dev/shm && exec "$@"', "sh")
ALL_NEAR, NONE_NEAR = "near [1, 2]", "near []"


@pytest.fixture(autouse=True)
def _can():
    if MPIRUN is None:
        pytest.skip("no mpirun beside this Python or on PATH")
    tried = subprocess.run([*PROCESSES, *USERS, *PROCESSES, "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"no namespaces: {tried.stderr.strip()}")


def said(*parts):
    done = subprocess.run(parts, capture_output=True, text=True, timeout=120, env=environment(), check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


AROUND_RANKS = {
    "processes": (PROCESSES, [NONE_NEAR, f"transports {NO_SHARED_MEMORY}"]),
    "processes and memory": ((*PROCESSES, *OWN_MEMORY), [NONE_NEAR, f"transports {NO_SHARED_MEMORY}"]),
    "users": (USERS, [NONE_NEAR, "transports None"]),
    "users, processes and memory": ((*USERS, *PROCESSES, *OWN_MEMORY), [NONE_NEAR, f"transports {NO_SHARED_MEMORY}"]),
}


@pytest.mark.parametrize("own", AROUND_RANKS if ALL else ["processes"])
def test_each_rank_in_a_container(own):
    """With other process namespaces, all ranks have the number 1, on a host of one name."""
    *mpirun, python, program = command(3, PROGRAM)
    around, words = AROUND_RANKS[own]
    assert said(*mpirun, *around, python, program) == words


@pytest.mark.skipif(not ALL, reason="FEDHPC_TEST_ALL is not set")
@pytest.mark.parametrize("around", [PROCESSES, (*USERS, *PROCESSES, *OWN_MEMORY)])
def test_mpirun_in_a_container(around):
    assert said(*around, *command(3, PROGRAM)) == [ALL_NEAR, "transports None"]


@pytest.mark.parametrize("launcher", ["prterun", "slurmstepd", "bash"])
def test_a_launcher_in_the_same_container(tmp_path, launcher):
    program = shutil.copy(shutil.which("sh"), tmp_path / launcher)
    ask = "from fedhpc.job.container import is_cut_off; print(is_cut_off())"
    assert said(*PROCESSES, program, "-c", '"$@"; exit', "sh", sys.executable, "-c", ask) == [str(launcher == "bash")]


def test_a_choice_of_transports_stays(monkeypatch):
    monkeypatch.setattr(exchange, "is_cut_off", lambda: True)
    monkeypatch.setenv(TRANSPORTS, "self,tcp")
    prepare_mpi()
    assert os.environ[TRANSPORTS] == "self,tcp"


def test_a_container_that_hides_the_launchers_files(monkeypatch, tmp_path):
    monkeypatch.setenv("PRTE_LAUNCHED", "1")
    monkeypatch.setenv("PMIX_SERVER_TMPDIR", str(tmp_path / "hidden"))
    with pytest.raises(UserError, match=r"hidden \(PMIX_SERVER_TMPDIR\) is not there.* bind the host's"):
        prepare_mpi()
