"""Ranks of other MPIs than this environment's, those of PyPI and of the distribution: stopped, killed, gone on with.

By default one of each. FEDHPC_TEST_ALL=1 tries all of them, what more the table of docs/mpi.md says, and has `fedhpc
doctor` examine each.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from launch import MPIRUN, command, environment
from strike import Job

from fedhpc.commands import cli
from fedhpc.errors import EXIT_FAILURE, EXIT_STOPPED, EXIT_USER_ERROR

ALL = "FEDHPC_TEST_ALL" in os.environ
ROUNDS, LONG_S = 24, 120
ROOT, PREFIX = Path(__file__).parents[2], Path(sys.prefix)
DEBIANS_MPICH = "libmpich.so.12"
"""Its name for what is libmpi.so.12 elsewhere, under which alone mpi4py finds it."""
MPIS = {
    # as in the table -> launcher, library, whether the launcher hands SIGTERM on to the ranks
    "Open MPI 5.0": (PREFIX / "bin/mpiexec", PREFIX / "lib/libmpi.so.40", False),
    "MPICH 5.0": (PREFIX / "mpi/mpich/bin/mpiexec", PREFIX / "mpi/mpich/lib/libmpi.so.12", True),
    "Intel MPI 2021.19": (PREFIX / "mpi/impi-rt/bin/mpiexec", PREFIX / "mpi/impi-rt/lib/libmpi.so.12", True),
    "Open MPI 4.1": (shutil.which("mpirun.openmpi"), "/usr/lib/*/libmpi.so.40", False),
    "MPICH 4.0": (shutil.which("mpiexec.mpich"), f"/usr/lib/*/{DEBIANS_MPICH}", True),
}


@pytest.fixture(scope="module", params=MPIS if ALL else ["MPICH 5.0", "Open MPI 4.1"])
def mpi(request, tmp_path_factory):
    """Its name, what `make MPI=system` makes of its launcher, and the environment that it needs."""
    launcher, library, _ = MPIS[request.param]
    library = next(Path("/").glob(str(library)[1:]), None)
    if launcher is None or library is None:
        pytest.skip(f"no {request.param} (make test)")
    version = request.param.rpartition(" ")[2]
    if version not in subprocess.run([launcher, "--version"], capture_output=True, text=True, check=False).stdout:
        pytest.skip(f"{launcher} is no {request.param}")
    folder = tmp_path_factory.mktemp("mpi")
    mpirun, link = folder / "mpirun", folder / "libmpi.so.12"
    mpirun.write_text((ROOT / "jobs/mpirun.sh").read_text().replace("@MPIEXEC@", str(launcher)))
    mpirun.chmod(0o755)
    if library.name == DEBIANS_MPICH:
        link.symlink_to(library)
        return request.param, str(mpirun), {"MPI4PY_LIBMPI": str(link), "LD_LIBRARY_PATH": str(folder)}
    return request.param, str(mpirun), {"MPI4PY_LIBMPI": str(library)}


@pytest.fixture(scope="module")
def configuration(world, tmp_path_factory):
    """Of a run that nothing disturbs, in one process, and its final prompts."""
    changes = {"federation__rounds": ROUNDS, "trace": False, "device__reset_moments": False, "evaluate__every": 20}
    config = tiny.write_config(world, tmp_path_factory.mktemp("alone"), "run", **changes)
    assert cli.main(["run", str(config)]) == 0
    return config, tiny.final_prompts(config)


def count_lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def strike(job, config, number, round_index, *, rank=None):
    """Send a signal to a rank, or to the launcher, when a round is done; the status with which the launcher ends."""
    process, path = job.launcher.pid if rank is None else job.find(rank), tiny.run_dir(config) / "metrics.jsonl"
    begun = count_lines(path)
    assert job.until(lambda: count_lines(path) > max(begun, round_index), LONG_S), job.text()
    assert job.strike(process, number), job.text()
    status = job.wait(LONG_S)
    assert status is not None, job.text()
    assert not job.left()
    return status


def test_a_run_that_is_stopped_and_killed_goes_on_to_the_same_bits(mpi, configuration, tmp_path):
    name, launcher, variables = mpi
    undisturbed, prompts = configuration
    config = tiny.write_config(undisturbed, tmp_path, "run")

    def start(num_ranks):
        output = tmp_path / "output.txt"
        words = "-m", "fedhpc", "run", config
        return Job(num_ranks, *words, output=output, launcher=launcher, variables=variables)

    with start(2) as job:
        status = strike(job, config, signal.SIGKILL, 2, rank=1)
        assert status not in (0, EXIT_USER_ERROR, EXIT_STOPPED), job.text()
    if ALL:
        with start(3) as job:
            status = strike(job, config, signal.SIGTERM, 5)
            killed = status not in (0, EXIT_USER_ERROR, EXIT_STOPPED)
            assert status == EXIT_STOPPED if MPIS[name][2] else killed, job.text()
    with start(3) as job:
        assert strike(job, config, signal.SIGUSR1, 8) == EXIT_STOPPED, job.text()
        assert "stopped on request (SIGUSR1" in job.text()
        assert "3 ranks" in job.text()
    with start(2) as job:
        assert job.wait(LONG_S) == 0, job.text()
    assert tiny.final_prompts(config) == prompts


@pytest.mark.skipif(MPIRUN is None, reason="no mpirun beside this Python or on PATH")
def test_a_library_that_cannot_be_loaded(world):
    own = environment() | {"MPI4PY_LIBMPI": "/nowhere/libmpi.so"}
    run = command(2, "-m", "fedhpc", "run", world)
    done = subprocess.run(run, capture_output=True, text=True, timeout=LONG_S, env=own, check=False)
    assert done.returncode == EXIT_FAILURE  # another node may have it
    assert f"{socket.gethostname()}: mpi4py loads no MPI library: /nowhere/libmpi.so: cannot open" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_page_says_what_is_tried():
    rows = [line.split("|")[1:4] for line in (ROOT / "docs/mpi.md").read_text().splitlines() if line.count("|") == 6]
    said = {name.strip(): "stops the run" in words for name, _, words in rows[2:]}
    assert said == {name: handed_on for name, (_, _, handed_on) in MPIS.items()}
    pins = dict(re.findall(r"^(\S+)==(\d+\.\d+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    for package, name in {"openmpi": "Open MPI", "mpich": "MPICH", "impi-rt": "Intel MPI"}.items():
        assert f"{name} {pins[package]}" in MPIS


@pytest.mark.skipif(not ALL, reason="FEDHPC_TEST_ALL is not set")
def test_doctor_finds_no_problem_with_it(mpi, tmp_path):
    name, launcher, variables = mpi
    run = command(2, "-m", "fedhpc", "doctor", tmp_path / "run", "--json", tmp_path / "report.json", launcher=launcher)
    path = os.pathsep.join([str(Path(launcher).parent), os.environ["PATH"]])
    own = environment() | variables | {"PATH": path}
    done = subprocess.run(run, capture_output=True, text=True, timeout=LONG_S, env=own, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    said = {finding["name"]: finding["value"] for finding in report["findings"]}
    assert name.split()[0] in said["library"]
    assert said["ranks"].startswith("2 find each other")
