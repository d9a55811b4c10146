"""Ranks on several hosts, by every launcher: placed as asked for, near and far ones mixed, to the bits of one process.

By default two jobs that have every oddity at once, and what is refused. FEDHPC_TEST_ALL=1 tries each cell of the table
by itself, some minutes.
"""

import os
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
import tiny
from cluster import Cluster, missing_program
from hosts import BESIDE_PYTHON, ROOT

from fedhpc.commands import cli

ALL = "FEDHPC_TEST_ALL" in os.environ
CPUS = (4, 10, 3)
DEVICES, ROUNDS = 6, 2
HEADER_BYTES, COMMAND_BYTES, PLACE_BYTES = 64, 72, 12
PROMPT_BYTES = 4 * 2 * 2 * tiny.NUM_TOKENS * tiny.KEY_WIDTH
"""Of two layers of four."""
COMMAND = """\
#!/bin/bash
hostname >>{folder}/placed
export OMPI_MCA_mpi_yield_when_idle=1 OMPI_MCA_threads_pthreads_yield_strategy=nanosleep OPENBLAS_NUM_THREADS=1
export OMPI_MCA_threads_pthreads_nanosleep_time=100000 PYTHONPATH={root} {variables}
exec {python} -m fedhpc "$@"
"""


class HostCluster(Cluster):
    """SLURM with a node on each host."""

    def __init__(self, hosts):
        folder = hosts.folder / "slurm"
        folder.mkdir()
        super().__init__(folder, CPUS)
        self.hosts = hosts

    def nodes(self):
        return {name: (name, address) for name, address in self.hosts.addresses.items()}

    def on(self, node, command, cwd=None):
        return self.hosts.command(node, *command, cwd=cwd)


@pytest.fixture(scope="module")
def cluster(hosts):
    if program := missing_program():
        pytest.skip(f"SLURM: no {program} (tests/install.sh)")
    cluster = HostCluster(hosts)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A top folder with this checkout's job files, and a command that notes on which host each rank is."""
    folder = tmp_path_factory.mktemp("checkout")
    (folder / ".venv/bin").mkdir(parents=True)
    (folder / "jobs").symlink_to(ROOT / "jobs")
    mpirun = (ROOT / "jobs/mpirun.sh").read_text().replace("@MPIEXEC@", str(BESIDE_PYTHON / "mpiexec"))
    scripts = {"mpirun": mpirun, "fedhpc": command(folder)}
    for name, library in OTHER_MPI.items():
        if library.exists():
            scripts[name] = command(folder, f"MPI4PY_LIBMPI={library}")
    for name, script in scripts.items():
        (folder / ".venv/bin" / name).write_text(script)
        (folder / ".venv/bin" / name).chmod(0o755)
    return folder


def command(folder, variables=""):
    return COMMAND.format(folder=folder, root=ROOT, python=sys.executable, variables=variables)


@pytest.fixture(scope="module")
def config(world, tmp_path_factory):
    """Of a run that is over as soon as it has begun."""
    changes = {"federation__num_devices": DEVICES, "federation__rounds": ROUNDS, "trace": False}
    return tiny.write_config(world, tmp_path_factory.mktemp("alone"), "run", **changes)


@pytest.fixture(scope="module")
def alone(config):
    """The final prompts of one process."""
    assert cli.main(["run", str(config)]) == 0
    return tiny.final_prompts(config)


# The table: launchers by situations.

OTHER_MPI = {name: Path(sys.prefix) / "mpi" / name / "lib/libmpi.so.12" for name in ("mpich", "impi-rt")}
LAUNCHERS = {
    # name: plug-in of srun, FEDHPC; None without SLURM
    "mpirun": None,
    "mpirun in SLURM": ("", ".venv/bin/fedhpc"),
    "srun with Open MPI": ("pmix", ".venv/bin/fedhpc"),
    "srun with MPICH": ("pmi2", ".venv/bin/mpich"),
    "srun with Intel MPI": ("pmi2", ".venv/bin/impi-rt"),
}
SITUATIONS = {
    "even": {"slots": (1, 1, 1)},
    "uneven": {"slots": (2, 1, 1)},
    "one node": {"slots": (3, 0, 0)},
    "17 ranks": {"slots": CPUS},
    "heterogeneous job": {"only": "srun", "slots": (1, 2, 2), "parts": True},
    "no environment": {"only": "SLURM|srun", "slots": (1, 1, 1), "options": ["--export=NONE"]},
    "odd names": {"slots": (1, 1, 1), "options": ["--job-name=a job/of mine"], "run": "a run/of mine"},
    "submitted from elsewhere": {"slots": (1, 1, 1), "cwd": "/"},
    "no home to write to": {"slots": (1, 1, 1), "variables": {"HOME": "/proc"}},
}
EVERYTHING = {
    "slots": (2, 1, 0),
    "options": ["--export=NONE", "--job-name=a job/of mine"],
    "run": "a run/of mine",
    "cwd": "/",
    "variables": {"HOME": "/proc"},
}


CELLS = {
    f"{launcher}, {situation}": (launcher, case)
    for launcher in LAUNCHERS
    for situation, case in SITUATIONS.items()
    if re.search(case.get("only", ""), launcher)
}
if not ALL:
    CELLS = {f"{launcher}, all at once": (launcher, EVERYTHING) for launcher in ("mpirun", "mpirun in SLURM")}


@pytest.mark.parametrize("cell", CELLS)
def test_the_bits_and_bytes_of_one_process(request, hosts, checkout, config, alone, tmp_path, cell):
    launcher, case = CELLS[cell]
    placed = checkout / "placed"
    placed.unlink(missing_ok=True)
    run = case.get("run", "run")
    own = tiny.write_config(config, tmp_path, run.partition("/")[0], run_dir=str(tmp_path / run))
    if LAUNCHERS[launcher] is None:
        said, places = start_by_mpirun(hosts, checkout, case, own)
    else:
        said, places = start_by_slurm(request.getfixturevalue("cluster"), checkout, launcher, case, own)
    assert Counter(placed.read_text().split()) == places, said
    assert tiny.final_prompts(own) == alone
    records = tiny.metrics(own)
    assert len(records) == ROUNDS
    for record in records:
        count = len(record["devices"])
        assert record["bytes_up"] == count * (PROMPT_BYTES + HEADER_BYTES)
        each = PROMPT_BYTES + COMMAND_BYTES + PLACE_BYTES * count
        assert record["bytes_down"] == (sum(places.values()) - 1) * each


def start_by_mpirun(hosts, checkout, case, config):
    """Without a scheduler; what was said, and how many ranks each host should have had."""
    slots = case["slots"]
    command = hosts.mpirun(slots, "-np", sum(slots), checkout / ".venv/bin/fedhpc", "run", config)
    done = hosts.run("node1", *command, cwd=case.get("cwd", checkout), check=False, **case.get("variables", {}))
    assert done.returncode == 0, done.stderr
    return done.stderr, {name: count for name, count in zip(hosts.names, slots, strict=True) if count}


def start_by_slurm(cluster, checkout, launcher, case, config):
    """By jobs/demo.slurm; the same."""
    plugin, fedhpc = LAUNCHERS[launcher]
    if not (checkout / fedhpc).exists():
        pytest.skip(f"no {OTHER_MPI[Path(fedhpc).name]} (make test)")
    if plugin and plugin not in cluster.run("srun", "--mpi=list").stdout.split():
        pytest.skip(f"this SLURM has no plug-in {plugin}")
    options = [f"--chdir={checkout}", f"--output={checkout}/%j.out", "--mem-per-cpu=1G", *case.get("options", [])]
    slots = [count for count in case["slots"] if count]
    size, step = [f"--ntasks={sum(slots)}", f"--nodes={len(slots)}"], ""
    if "parts" in case:
        second = ["--ntasks=4", "--ntasks-per-node=2", "--nodelist=node[2-3]", "--mem-per-cpu=1G"]
        size, step = ["--ntasks=1", "--nodelist=node1", ":", *second], " --het-group=0,1"
    settings = f"FEDHPC={fedhpc}\necho $(scontrol show hostnames) = $SLURM_TASKS_PER_NODE\n"
    if plugin:
        settings += f"LAUNCH='srun --mpi={plugin} --kill-on-bad-exit=1{step}'\n"
    job_file = checkout / "job.slurm"
    job_file.write_text((ROOT / "jobs/demo.slurm").read_text().replace("\n. jobs", f"\n{settings}. jobs"))
    submit = ["sbatch", "--parsable", *options, *size, job_file, config]
    number = cluster.run(*submit, cwd=case.get("cwd", checkout), **case.get("variables", {})).stdout.strip()
    job = cluster.ended(number)
    said = (checkout / f"{number}.out").read_text()
    assert job["JobState"] == "COMPLETED", said
    if "parts" in case:
        return said, dict(zip(cluster.hosts.names, slots, strict=True))
    nodes, _, counts = said.partition("\n")[0].partition(" = ")
    tasks = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts):
        tasks += [int(count)] * int(times or 1)
    assert sum(tasks) == sum(slots)
    return said, dict(zip(nodes.split(), tasks, strict=True))


@pytest.mark.skipif(not ALL, reason="FEDHPC_TEST_ALL is not set")
def test_records_of_near_and_far_workers(hosts):
    """Two of the workers on each host, and one on the server's."""
    command = hosts.mpirun((2, 2, 1), "-np", 5, sys.executable, ROOT / "tests/mpi/near_and_far.py")
    assert hosts.run("node1", *command).stdout == "near [1]\n"


REFUSED = {
    # LAUNCH, size of the job, what the output says
    "more ranks than tasks": (".venv/bin/mpirun -np 6", ["--ntasks=3"], "before the ranks had found each other"),
    "the same by srun": ("srun --mpi=pmix -n 6", ["--ntasks=3"], "before the ranks had found each other"),
    "mpirun, two parts": (".venv/bin/mpirun -np 1", ["--ntasks=1", ":", "--ntasks=2"], "of a heterogeneous job only"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_started_is_refused(cluster, checkout, name):
    launch, size, message = REFUSED[name]
    submit = ["sbatch", "--parsable", f"--output={checkout}/%j.out", *size, ROOT / "jobs/demo.slurm"]
    number = cluster.run(*submit, cwd=checkout, LAUNCH=launch).stdout.strip()
    assert cluster.ended(number)["JobState"] == "FAILED"
    assert message in (checkout / f"{number}.out").read_text()


def test_more_ranks_than_slots_by_mpirun(hosts):
    """The programs last a second: Open MPI 5.0's mpirun waits for ever for some of those that end at once."""
    command = hosts.mpirun((2, 1, 1), "-np", 7, "sh", "-c", "hostname; sleep 1")
    assert Counter(hosts.run("node1", *command).stdout.split()) == {"node1": 3, "node2": 2, "node3": 2}
