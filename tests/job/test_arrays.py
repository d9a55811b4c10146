"""An experiment's cells as jobs of each scheduler but SLURM (tests/slurm): what is submitted, and what tasks run."""

import json
import shutil
from pathlib import Path

import pytest
from stand_ins import JOBS, StandIn

from fedhpc.commands import cli
from fedhpc.commands.sweep.experiment import load_experiment
from fedhpc.job.schedulers.lsf import LsfEnvironment
from fedhpc.job.schedulers.pbs import PbsEnvironment
from fedhpc.job.schedulers.slurm import SlurmEnvironment

SCHEDULERS = {"pbs": "PBS", "lsf": "LSF", "flux": "Flux"}


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A scheduler's stand-in beside an experiment of five cells, of which numbers 1 and 3 are done."""

    def start(key):
        cluster = StandIn(tmp_path, key)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("PATH", cluster.path)
        (tmp_path / "data").mkdir()
        (tmp_path / "data/description.json").write_text("{}")
        values = {"base": str(JOBS / "demo.yaml"), "out": "out", "grid": {"seed": [0, 1, 2, 3, 4]}}
        values["set"] = {"data.path": "data", "federation.rounds": 1}
        (tmp_path / "my grid.yaml").write_text(json.dumps(values))
        for cell in load_experiment(Path("my grid.yaml")).cells[1:4:2]:
            cell.run_dir.mkdir(parents=True)
            record = '{"round": 0, "accuracy": null, "bytes": 0}\n'
            (cell.run_dir / "metrics.jsonl").write_text(record)
        return cluster

    return start


def sweep(*options):
    return cli.main(["sweep", "my grid.yaml", *options])


def cells_run(cluster):
    """The numbers of the cells that jobs have run, in turn."""
    runs = [line for line in cluster.output.splitlines() if ": fedhpc run " in line]
    digest = load_experiment(Path("my grid.yaml")).digest
    assert all(f"fedhpc run sweep my grid.yaml --expect {digest} " in line for line in runs)
    return [int(line.rpartition(" --cell ")[2]) for line in runs]


ARRAYS = {
    "pbs": ["qsub -J 1-3%2 -v FEDHPC_ARRAY,FEDHPC_JOB_FILE out/sweep.pbs"],
    "lsf": ["bsub -J fedhpc-my_grid[1-3]%2"],
    "flux": [
        "flux batch out/sweep.flux",
        "flux batch out/sweep.flux",
        "flux batch --dependency=afterany:f1 out/sweep.flux",
    ],
}
CANCEL = {"pbs": "qdel '1[].server'", "lsf": "bkill 1", "flux": "flux cancel f3 f2 f1"}


@pytest.mark.parametrize("key", SCHEDULERS)
def test_the_cells_that_are_not_done_are_run(cluster, capfd, key):
    cluster = cluster(key)
    (cluster.folder / "statuses").write_text("0 0 2\n")
    assert sweep("--submit", "--scheduler", key, "--ranks", "1", "--time", "1h", "--jobs", "2") == 0
    assert [line for line in cluster.asked() if line.split()[0] in ("qsub", "bsub") or "batch" in line] == ARRAYS[key]
    assert capfd.readouterr().out.endswith(f"submitted; to cancel: {CANCEL[key]}\n")
    assert cluster.run_all() == [0, 0, 2], cluster.output
    assert cells_run(cluster) == [0, 2, 4]
    last = (cluster.folder / "logs/cell4.log").read_text().splitlines()
    assert last[1].startswith(f"in {SCHEDULERS[key]} job ")
    assert last[2] == "=== exit status 2"


@pytest.mark.parametrize(
    ("key", "statuses", "ended", "cells"),
    [
        ("lsf", "75 0 0 0", [75, 0, 0, 0], [0, 2, 4, 0]),
        ("flux", "75 0 0 0", [75, 0, 0, 0], [0, 2, 4, 0]),
        ("pbs", "75 0 0", [75, 0, 0], [0, 2, 4]),
    ],
)
def test_a_task_that_is_stopped_goes_on_where_the_scheduler_lets_it(cluster, key, statuses, ended, cells):
    cluster = cluster(key)
    (cluster.folder / "statuses").write_text(f"{statuses}\n")
    assert sweep("--submit", "--scheduler", key, "--ranks", "1") == 0
    assert cluster.run_all() == ended, cluster.output
    assert cells_run(cluster) == cells
    said = (
        "fedhpc job: stopped; PBS does not requeue it: when the array has ended, the same fedhpc sweep --submit goes on"
    )
    assert (said in cluster.output.splitlines()) is (key == "pbs")
    assert not list(cluster.folder.glob("fedhpc-*"))


def test_a_single_cell_is_no_array_for_pbs_and_submits_itself_again(cluster):
    cluster = cluster("pbs")
    for number in (2, 4):
        shutil.copytree("out/seed=1", f"out/seed={number}")
    (cluster.folder / "statuses").write_text("75 0\n")
    assert sweep("--submit", "--scheduler", "pbs", "--ranks", "1") == 0
    assert cluster.run_all() == [75, 0], cluster.output
    assert cells_run(cluster) == [0, 0]
    assert cluster.asked() == [
        "qsub -v FEDHPC_ARRAY,FEDHPC_JOB_FILE out/sweep.pbs",
        "qsub -W depend=afterany:1.server -v FEDHPC_FIRST_JOB=1.server,FEDHPC_ARRAY,FEDHPC_JOB_FILE out/sweep.pbs",
    ]


def test_a_list_that_tasks_may_still_look_at_stays(cluster):
    cluster = cluster("pbs")
    assert sweep("--submit", "--scheduler", "pbs") == 0
    before = {path.name: path.read_text() for path in (cluster.folder / "out").glob("*.tasks")}
    shutil.copytree("out/seed=1", "out/seed=0")
    assert sweep("--submit", "--scheduler", "pbs") == 0
    after = {path.name: path.read_text() for path in (cluster.folder / "out").glob("*.tasks")}
    assert len(after) == 2
    assert before.items() < after.items()


def test_a_file_of_ones_own(cluster):
    cluster = cluster("lsf")
    assert sweep("--submit", "--scheduler", "lsf", "--ranks", "1", "--dry-run") == 0
    made = (cluster.folder / "out/sweep.lsf").read_text()
    (cluster.folder / "mine.lsf").write_text(f"{made.splitlines()[0]}\n#BSUB -W 9\n{made.partition('#BSUB')[2]}")
    (cluster.folder / "statuses").write_text("0 0 0\n")
    assert sweep("--submit", "mine.lsf", "--scheduler", "lsf") == 0
    assert (cluster.folder / "job.1").read_text() == (cluster.folder / "mine.lsf").read_text()
    assert cluster.run_all() == [0, 0, 0], cluster.output
    assert cells_run(cluster) == [0, 2, 4]


def test_under_slurm_a_file_is_made_where_something_is_asked_for(cluster, fedhpc):
    cluster = cluster("pbs")
    command = ("sweep", "my grid.yaml", "--submit", "--scheduler", "slurm", "--dry-run")
    digest = load_experiment(Path("my grid.yaml")).digest
    for options, file in ((), "jobs/sweep.slurm"), (("--ranks", 3, "--nodes", 2), "out/sweep.slurm"):
        assert fedhpc(*command, *options)[1] == f"sbatch --array=0,2,4 {file} 'my grid.yaml' --expect {digest}\n"
    made = (cluster.folder / "out/sweep.slurm").read_text()
    assert {"#SBATCH --ntasks=3", "#SBATCH --nodes=2", "#SBATCH --output=%x-%A_%a.out"} <= set(made.splitlines())
    assert made.endswith('\n. jobs/cell.sh "$@"\n')


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--submit job.slurm --scheduler pbs", "--submit job.slurm: is a job file of SLURM, but PBS is to take it"),
        ("--submit job.pbs --nodes 2 --scheduler pbs", "--nodes: --submit job.pbs says itself what it asks for"),
        ("--submit --scheduler lsf", "--scheduler lsf: there is no bsub on PATH"),
        ("--submit --scheduler flux --dry-run --memory 4G", "--memory: Flux shares nodes by cores and GPUs"),
        ("--submit --time 30s --scheduler pbs", "--time: 30 s, but the run stops 60 s before the end"),
        ("--ranks 3", "--ranks: goes with --submit"),
        ("--scheduler pbs", "--scheduler: goes with --submit"),
        (
            "--submit --scheduler pbs",
            "my grid.yaml: --submit: an array of 3 cells is needed, but PBS allows 2 here (max_array_size)",
        ),
    ],
)
def test_what_is_refused(cluster, fedhpc, options, message):
    cluster = cluster("pbs")
    (cluster.folder / "bin/qstat").write_text("""#!/bin/sh\necho '{"Server": {"s": {"max_array_size":\t2}}}'\n""")
    (cluster.folder / "bin/qstat").chmod(0o755)
    (cluster.folder / "job.slurm").write_text("#!/bin/bash\n#SBATCH --ntasks=1\n")
    (cluster.folder / "job.pbs").write_text("#!/bin/bash\n#PBS -r y\n")
    status, out, err = fedhpc("sweep", "my grid.yaml", *options.split())
    assert (status, out) == (2, "")
    assert message in err
    assert not cluster.asked()


@pytest.mark.parametrize(
    ("scheduler", "program", "says", "limit"),
    [
        (SlurmEnvironment, "scontrol", "MaxArraySize            = 1001", (1001, "MaxArraySize")),
        (PbsEnvironment, "qstat", '"max_array_size":\t10000,', (10000, "max_array_size")),
        (LsfEnvironment, "bparams", "MAX_JOB_ARRAY_SIZE = 1000", (1000, "MAX_JOB_ARRAY_SIZE")),
    ],
)
def test_how_large_an_array_may_be(tmp_path, scheduler, program, says, limit):
    job = scheduler({"PATH": str(tmp_path)})
    assert job.array_limit() is None
    (tmp_path / program).write_text(f"#!/bin/sh\necho 'x = 1'; echo '{says}'\n")
    (tmp_path / program).chmod(0o755)
    assert job.array_limit() == limit
