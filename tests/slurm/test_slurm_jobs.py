"""The shipped job files under real SLURM daemons: they finish, or go on where they were, to the same bits."""

import json
import random
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

import pytest
import tiny
from cluster import Cluster, missing_program

from fedhpc.commands import cli

ROOT = Path(__file__).parent.parent.parent
MPIRUN = Path(sys.executable).parent / "mpirun"
DONE = re.compile(r"done after round 20; .* final prompts sha256 ([0-9a-f]{64})$", re.MULTILINE)
RANKS_TAKE_TURNS = {
    "OMPI_MCA_mpi_yield_when_idle": 1,
    "OMPI_MCA_threads_pthreads_yield_strategy": "nanosleep",
    "OMPI_MCA_threads_pthreads_nanosleep_time": 100000,
    "OPENBLAS_NUM_THREADS": 1,
}
"""The cluster has fewer cores than it claims."""
UNEVEN = (4, 10, 6)
"""CPUs of the nodes: SLURM gives 17 tasks to them as 4, 10 and 3."""
LAUNCHER = f"""\
#!/bin/bash
# Fewer than the 17 that are asked for, whose start would take half a minute; in the first run on all three nodes.
case ${{SLURM_RESTART_COUNT:-0}} in
0) ranks="$(($2 - 10)) --map-by node:OVERSUBSCRIBE" ;;
2) ranks=3 ;;
*) ranks=5 ;;
esac
exec {MPIRUN} -np $ranks "${{@:3}}"
"""
COMMAND = f"""\
#!/bin/bash
export {" ".join(f"{key}={value}" for key, value in RANKS_TAKE_TURNS.items())} PYTHONPATH={ROOT}
exec {sys.executable} -m fedhpc "$@"
"""
SEED = 42
DEMO_S = 300
"""More than a run of the demo takes on two busy cores."""

pytestmark = [
    pytest.mark.skipif(missing_program() is not None, reason=f"SLURM: no {missing_program()} (tests/install.sh)"),
    pytest.mark.skipif(not MPIRUN.exists(), reason="no mpirun beside this Python"),
]


@pytest.fixture(scope="module")
def cluster():
    # Not in pytest's folder: the path of munge's socket may have 107 characters.
    folder = tempfile.mkdtemp(prefix="fedhpc-slurm-", dir="/tmp")
    cluster = Cluster(folder, UNEVEN)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A top folder to submit from, which jobs may write into."""
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "jobs").symlink_to(ROOT / "jobs")
    return folder


# The demo.


@pytest.fixture(scope="module")
def demo(checkout):
    """The demo's inputs, fewer of them, in the checkout; what a run of it there changes in its configuration."""
    make_demo, prepare = tiny.load_script("make_demo"), tiny.load_script("prepare")
    few = {"train_examples": 1500, "dev_examples": 60, "pretraining_texts": 1200, "pretraining_steps": 2}
    assert make_demo.make_demo(checkout / "backbone", make_demo.DemoSettings(**few))
    arguments = ["--task", ROOT / "data_prep/tasks/demo.yaml", "--source", checkout / "backbone/data"]
    arguments += ["--model", checkout / "backbone/model", "--out", checkout / "prepared"]
    assert prepare.main([str(argument) for argument in arguments]) == 0

    def overrides(run_dir):
        names = {"run_dir": run_dir, "model.name": "backbone/model", "data.path": "prepared"}
        values = [f"{key}={checkout / name}" for key, name in names.items()]
        return [part for value in [*values, "evaluate.every=10"] for part in ("--set", value)]

    return overrides


@pytest.fixture(scope="module")
def undisturbed(checkout, demo):
    """The SHA-256 of the final prompts of one process that nobody disturbs."""
    assert cli.main(["run", str(ROOT / "jobs/demo.yaml"), *demo("undisturbed")]) == 0
    return DONE.search((checkout / "undisturbed/log.txt").read_text())[1]


def latest_round(run_dir):
    """The last line of a run's metrics; one of round -1 before the first."""
    file = run_dir / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return json.loads(lines[-1]) if lines else {"round": -1}


@pytest.mark.usefixtures("stand_ins")  # whose delays pass meanwhile
def test_a_job_that_is_interrupted_again_and_again_ends_with_the_same_bits(cluster, checkout, demo, undisturbed):
    dice = random.Random(SEED)
    requeue, signal = ["scontrol", "requeue"], ["scancel", "--signal=USR1", "--batch"]
    interruptions = [requeue, signal, dice.choice([requeue, signal])]
    dice.shuffle(interruptions)
    run_dir, bin_dir = checkout / "disturbed", checkout / ".venv/bin"
    bin_dir.mkdir(parents=True)
    for name, script in (("mpirun", LAUNCHER), ("fedhpc", COMMAND)):
        (bin_dir / name).write_text(script)
        (bin_dir / name).chmod(0o755)
    # Without the user's environment, and by the default launcher.
    number = cluster.submit(checkout, "--export=NONE", "jobs/demo.slurm", "jobs/demo.yaml", *demo("disturbed"))
    output = checkout / f"{number}.out"
    for index, command in enumerate(interruptions):
        # In one of the rounds 1 to 14 of 20, after the run has come further than at the interruption before.
        target = max(5 * index + dice.randrange(4), latest_round(run_dir)["round"] + 1)
        deadline = time.monotonic() + DEMO_S
        while (latest := latest_round(run_dir))["round"] < target:
            assert time.monotonic() < deadline, output.read_text()
            time.sleep(0.05)
        time.sleep(dice.uniform(0, latest["seconds"]["round"]))
        cluster.run(*command, number)
        while (job := cluster.job(number))["JobState"] != "PENDING" or job["Restarts"] != str(index + 1):
            assert time.monotonic() < deadline, output.read_text()
            time.sleep(0.5)
    job = cluster.ended(number, DEMO_S)
    text, log = output.read_text(), (run_dir / "log.txt").read_text()
    assert re.findall(r"rank 0/(\d+) .* (?:starting at|resuming)", log) == ["7", "5", "3", "5"]
    assert text.splitlines()[-1] == "fedhpc job: done"
    assert (job["JobState"], job["Restarts"]) == ("COMPLETED", "3"), text
    # After `scontrol requeue`, a machine that is too busy may not get so far before SIGKILL.
    assert interruptions.count(signal) <= log.count("stopped on request") <= 3
    assert DONE.search(log)[1] == undisturbed


# What a job file does with each exit status. The ranks' place is taken by a script.

CASES = {
    # name: the exit statuses of its runs, SLURM's last word, restarts, what the output says
    "a run that is stopped goes on": ("75 0", ("COMPLETED", "0:0"), 1, "stopped; requeued"),
    "a run that never trains is not stopped for ever": (
        "early early",
        ("FAILED", "75:0"),
        1,
        "stopped before it trained anything (is the time limit too short?) for the 2. time, not run again",
    ),
    "only failures are counted": ("75 1 1", ("FAILED", "1:0"), 2, "failed with 1 for the 2. time, not run again"),
    "the user's fault is not repeated": ("2", ("FAILED", "2:0"), 0, "another run would not mend"),
    "a missing command is not repeated": ("127", ("FAILED", "127:0"), 0, "another run would not mend"),
    "a launcher that starts nothing is not run again": (
        "213",
        ("FAILED", "213:0"),
        0,
        "ended with 213 before the ranks had found each other",
    ),
    "unless it has started them before": ("75 213 0", ("COMPLETED", "0:0"), 2, "failed with 213; requeued"),
    "a launcher that loses its ranks has failed": ("lost 0", ("COMPLETED", "0:0"), 1, "the launcher lost the ranks"),
}
STAND_IN = """\
#!/bin/bash
# Ends with the first exit status of the file $1, and removes it from there.
read -r status rest <"$1"
echo "$rest" >"$1"
case $status in
127 | 213) ;;
*) touch "$FEDHPC_STARTED" ;;
esac
[ "$status" != lost ] || exit 0
[ "$status" != early ] || exit 75
[ "$status" != 75 ] || touch "$FEDHPC_TRAINED"
[ "$status" != 0 ] || touch "$FEDHPC_FINISHED"
exit "$status"
"""


@pytest.fixture(scope="module")
def submit_stand_in(cluster, checkout):
    """Submit demo.slurm, or by a command such as chain.sh, with a script in place of fedhpc."""
    script = checkout / "stand_in"
    script.write_text(STAND_IN)
    script.chmod(0o755)

    def submit(name, statuses, *arguments, command=("sbatch", "--parsable"), **variables):
        file = checkout / f"{name.replace(' ', '_')}.statuses"
        file.write_text(statuses)
        options = ["--ntasks=1", "--output=%j.out", *arguments, "jobs/demo.slurm"]
        variables = {"LAUNCH": "env", "FEDHPC": f"{script} {file}", "MAX_FAILURES": 1, **variables}
        return cluster.run(*command, *options, cwd=checkout, **variables).stdout.strip()

    return submit


@pytest.fixture(scope="module")
def stand_ins(submit_stand_in):
    """All cases and an array at once: most of their time is SLURM's delay before it runs a job again."""
    numbers = {name: submit_stand_in(name, statuses) for name, (statuses, *_) in CASES.items()}
    return {**numbers, "array": submit_stand_in("array", "0 0 75 0", "--array=0-2%1")}


@pytest.mark.parametrize("name", CASES)
def test_what_becomes_of_a_job(cluster, checkout, stand_ins, name):
    _, (state, exit_code), restarts, message = CASES[name]
    job = cluster.ended(stand_ins[name])
    assert (job["JobState"], job["ExitCode"], int(job["Restarts"])) == (state, exit_code, restarts)
    assert message in (checkout / f"{stand_ins[name]}.out").read_text()
    assert not list(checkout.glob(f"fedhpc-{stand_ins[name]}.*"))


def test_a_task_of_an_array_is_requeued_alone(cluster, stand_ins):
    # The last one, whose number is also the array's.
    number = stand_ins["array"]
    tasks = [cluster.ended(f"{number}_{index}") for index in range(3)]
    assert [(task["JobState"], task["Restarts"]) for task in tasks] == [("COMPLETED", n) for n in "001"]
    assert tasks[2]["JobId"] == number


def test_an_experiment_as_an_array(cluster, checkout, world):
    """On one CPU instead of 17 with GPUs: the header is for the user to edit."""
    header = {"ntasks": 1, "nodes": 1, "gres": "none", "mem": "1G"}
    job_file = re.sub(
        r"(?m)^#SBATCH --(\w+)=.*",
        lambda line: f"#SBATCH --{line[1]}={header[line[1]]}" if line[1] in header else line[0],
        (ROOT / "jobs/sweep.slurm").read_text(),
    )
    (checkout / "mine.slurm").write_text(job_file)
    misled = {"selection": {"strategy": "explicit", "layers": [9]}}  # of four
    grid = {"seed": [1], "cell": {"misled": misled, "sound": {}, "lost": misled}}
    experiment = {"base": str(world), "out": "array", "set": {"trace": False}, "grid": grid}
    (checkout / "experiment.yaml").write_text(json.dumps(experiment))
    command = [sys.executable, "-m", "fedhpc", "sweep", "experiment.yaml"]
    ours = {"PYTHONPATH": ROOT, "LAUNCH": "env", "FEDHPC": f"{sys.executable} -m fedhpc"}
    said = cluster.run(*command, "--submit", "mine.slurm", "--jobs", 3, cwd=checkout, **ours).stdout
    number = re.search(r"Submitted batch job (\d+)", said)[1]
    assert "--array=0-2%3 mine.slurm experiment.yaml --expect" in said
    assert [cluster.ended(f"{number}_{task}")["ExitCode"] for task in range(3)] == ["2:0", "0:0", "2:0"]
    left = cluster.run(*command, "--submit", "mine.slurm", "--dry-run", cwd=checkout, **ours).stdout
    assert "--array=0,2 " in left
    reported = cluster.run(*command, "--report", cwd=checkout, check=False, **ours)
    assert reported.returncode == 1
    lines = reported.stdout.splitlines()
    for task, cell in ((0, "misled"), (2, "lost")):
        place = lines.index(f"FAILED: seed=1,cell={cell}: failed with exit status 2, not begun")
        assert lines[place + 1] == f"    in SLURM job {number}_{task}"
    rows = (checkout / "array/results.csv").read_text().splitlines()
    assert [row.split(",")[:3] for row in rows[1:]] == [
        ["1", "misled", "0"],
        ["1", "sound", "3"],
        ["1", "lost", "0"],
    ]


def test_outside_a_checkout(cluster, world, tmp_path, monkeypatch):
    """A user's own job by `fedhpc init`, and an experiment's array: both find the package and the MPI beside it."""
    monkeypatch.chdir(tmp_path)
    source, backbone = world.parent / "source", world.parent / "backbone"
    assert cli.main(["init", "mine", "--data", str(source), "--model", str(backbone)]) == 0
    arguments = ["--task", "mine.task.yaml", "--source", source, "--model", backbone, "--head", "linear"]
    assert cli.main(["prepare", *map(str, arguments), "--out", "prepared/mine"]) == 0
    one = ["--set", "federation.rounds=1"]
    ours = {"PYTHONPATH": ROOT, **RANKS_TAKE_TURNS}
    own = cluster.submit(tmp_path, "--ntasks=2", "mine.slurm", "mine.yaml", *one, **ours)
    header = r"(?m)^#SBATCH --(nodes|gres|mem)=.*\n|(?<=--ntasks=)17"
    text = (ROOT / "fedhpc/job/templates/sweep.slurm").read_text()
    (tmp_path / "array.slurm").write_text(re.sub(header, lambda match: "" if match[1] else "2", text))
    grid = {"seed": [1]}
    (tmp_path / "experiment.yaml").write_text(json.dumps({"base": "mine.yaml", "out": "array", "grid": grid}))
    command = [sys.executable, "-m", "fedhpc", "sweep", "experiment.yaml", "--submit", "array.slurm", *one]
    said = cluster.run(*command, cwd=tmp_path, **ours).stdout
    array = re.search(r"Submitted batch job (\d+)", said)[1]
    assert cluster.ended(own)["JobState"] == "COMPLETED", (tmp_path / f"{own}.out").read_text()
    assert cluster.ended(f"{array}_0")["JobState"] == "COMPLETED", (
        tmp_path / f"fedhpc-sweep-{array}_0.out"
    ).read_text()
    for log in ("runs/mine/log.txt", "array/seed=1/log.txt"):
        text = (tmp_path / log).read_text()
        assert "rank 0/2" in text
        assert "done after round 1" in text


def test_a_chain_goes_on_without_requeueing_and_ends_with_the_first_success(cluster, checkout, submit_stand_in):
    said = submit_stand_in("chain", "75 0 0 0", command=("jobs/chain.sh", 4))
    numbers = re.fullmatch(r"submitted; to cancel all: scancel((?: \d+){4})", said)[1].split()
    jobs = [cluster.ended(number) for number in numbers]
    assert [job["JobState"] for job in jobs] == ["FAILED", "COMPLETED", "CANCELLED", "CANCELLED"]
    assert [(job["ExitCode"], job["Restarts"]) for job in jobs[:2]] == [("75:0", "0"), ("0:0", "0")]
    assert "the next job of the chain goes on" in (checkout / f"{numbers[0]}.out").read_text()


def test_tasks_that_do_not_find_each_other_are_refused(cluster, checkout):
    command = ["srun", "--ntasks=3", "--mpi=none", sys.executable, "-m", "fedhpc", "run", "jobs/demo.yaml"]
    done = cluster.run(*command, cwd=checkout, check=False, PYTHONPATH=ROOT)
    assert done.returncode == 2
    assert done.stderr.count("srun started 3 tasks, but MPI sees 1 of them") == 1
    assert "srun --mpi=pmix" in done.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "jobs").glob("*.slurm")), ids=lambda path: path.name)
def test_slurm_understands_every_line_of_a_job_file(cluster, path):
    done = cluster.run("sbatch", "--test-only", path, cwd=ROOT, check=False)
    # The node has no GPU, which is found out after all options are read.
    assert re.search(r"to start at|Requested node configuration is not available", done.stderr), done.stderr
