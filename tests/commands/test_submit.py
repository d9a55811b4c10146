"""fedhpc submit: the job files of all schedulers, how they are handed over, and what is refused."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fedhpc.commands import cli
from fedhpc.commands.submit.request import duration, gigabytes
from fedhpc.config.file import load_config
from fedhpc.job.environment import SCHEDULERS
from fedhpc.job.job_files import COMMAND, TEMPLATES

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "golden"
CLUSTERS = [key for key in SCHEDULERS if key != "none"]
CHAIN_OF_SMALL_JOBS = "--ranks 4 --nodes 2 --account lab --queue short --time 90m --chain 3"
LARGE_JOB = "--nodes 16 --ranks 17 --gpus-per-node 1 --cpus-per-task 4 --time 24:00:00"
"""That of jobs/llama7b_rte.slurm."""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a run's file, outside of a checkout, where no scheduler is."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/bash").symlink_to("/bin/bash")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my reviews.yaml").write_text((ROOT / "jobs/demo.yaml").read_text())
    return tmp_path


def put(folder, **programs):
    """Programs that write down their arguments and print their job's number."""
    for name, answer in programs.items():
        path = folder / "bin" / name
        path.write_text(f'#!/bin/bash\necho "{name} $*" >>{folder}/asked\n{answer}\n')
        path.chmod(0o755)


@pytest.mark.parametrize("key", SCHEDULERS)
def test_the_job_file(here, fedhpc, key):
    options = CHAIN_OF_SMALL_JOBS.split() if key != "none" else []
    command = ["submit", "my reviews.yaml", "--scheduler", key, *options, "--set", "seed=7", "--out", "a job"]
    status, out, err = fedhpc(*command, "--dry-run")
    assert (status, err) == (0, "")
    text = (here / "a job").read_text()
    assert out == f"{text}\na job is written\n"
    assert subprocess.run(["/bin/bash", "-n", "a job"], check=False).returncode == 0
    expected = (GOLDEN / f"reviews.{key}").read_text()
    assert text.replace(shlex.quote(COMMAND), "COMMAND").replace(str(TEMPLATES), "TEMPLATES") == expected


@pytest.mark.parametrize("key", ["pbs", "lsf", "flux"])
def test_the_examples_are_what_the_command_makes(fedhpc, monkeypatch, tmp_path, key):
    example = ROOT / f"jobs/llama7b_rte.{key}"
    (tmp_path / "jobs").mkdir()
    for name in ("launch.sh", "llama-7b", "llama-7b.yaml"):
        (tmp_path / "jobs" / name).symlink_to(ROOT / "jobs" / name)
    monkeypatch.chdir(tmp_path)
    memory = [] if key == "flux" else ["--memory", "64G"]
    command = ["submit", "jobs/llama-7b/rte.yaml", "--scheduler", key, *LARGE_JOB.split(), *memory]
    assert fedhpc(*command, "--out", f"jobs/{example.name}", "--dry-run")[0] == 0
    assert (tmp_path / "jobs" / example.name).read_text() == example.read_text()


def test_what_is_left_out_follows_from_the_run(here, fedhpc):
    config = load_config(here / "my reviews.yaml")
    assert fedhpc("submit", "my reviews.yaml", "--scheduler", "slurm", "--dry-run", "--set", "device.threads=3")[0] == 0
    text = (here / f"{config.run_dir}.slurm").read_text()
    assert f"#SBATCH --ntasks={1 + config.federation.devices_per_round}\n" in text
    assert "#SBATCH --cpus-per-task=3\n" in text
    assert not {"--time", "--mem", "--gres", "--account", "--partition"} & set(text.replace("=", " ").split())


CHAINS = {
    "slurm": [
        "sbatch --parsable job",
        "sbatch --parsable --kill-on-invalid-dep=yes --dependency=afternotok:1 job",
        "sbatch --parsable --kill-on-invalid-dep=yes --dependency=afternotok:1:2 job",
    ],
    "pbs": ["qsub job", "qsub -W depend=afternotok:1 job", "qsub -W depend=afternotok:1:2 job"],
    "lsf": ["bsub ", "bsub -w exit(1) -ti", "bsub -w exit(1) && exit(2) -ti"],
    "flux": [
        "flux batch job",
        "flux batch --dependency=afternotok:1 job",
        "flux batch --dependency=afternotok:1 --dependency=afternotok:2 job",
    ],
}
SAYS = {
    "slurm": "echo $number';lab'",
    "pbs": "echo $number",
    "lsf": 'echo "$(</dev/stdin)" >given; echo "Job <$number> is submitted to queue <normal>."',
    "flux": "echo $number",
}
PROGRAMS = {key: SCHEDULERS[key].submit_command for key in CLUSTERS}
CANCEL = {"slurm": "scancel", "pbs": "qdel", "lsf": "bkill", "flux": "flux cancel"}


@pytest.mark.parametrize("key", CLUSTERS)
def test_a_chain(here, fedhpc, key):
    put(here, **{PROGRAMS[key]: f"number=$(($(<n) + 1)); echo $number >n; {SAYS[key]}"})
    (here / "n").write_text("0")
    status, out, err = fedhpc("submit", "my reviews.yaml", "--ranks", 2, "--chain", 3, "--out", "job")
    assert (status, err) == (0, "")
    assert (here / "asked").read_text().splitlines() == CHAINS[key]
    assert out.endswith(f"submitted; to cancel: {CANCEL[key]} 3 2 1\n")
    if key == "lsf":
        assert (here / "given").read_text() == (here / "job").read_text()


def test_what_the_scheduler_refuses_ends_the_command_with_its_status(here, fedhpc):
    put(here, qsub="echo qsub: Unknown queue >&2; exit 170")
    status, out, err = fedhpc("submit", "my reviews.yaml", "--out", "job", "--chain", 2)
    assert (status, err) == (170, "qsub: Unknown queue\n")
    assert out.endswith("qsub failed with 170\n")


def test_without_a_scheduler_the_job_runs_here(here, monkeypatch):
    """In the place of the command, so that it gets the signals; also within a job of a scheduler, which it is not."""
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setenv("LAUNCH", "false")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    options = ["--scheduler", "none", "--ranks", "1", "--out", "job"]
    command = [sys.executable, "-m", "fedhpc", "submit", "my reviews.yaml", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "fedhpc job: ended with 1 before the ranks had found each other" in done.stdout
    assert "77" not in done.stdout


def test_a_name_cannot_add_lines_to_a_job_file(here, fedhpc):
    status, _, err = fedhpc("submit", "my reviews.yaml", "--scheduler", "pbs", "--dry-run", "--out", "o\necho\n#")
    assert (status, list(here.glob("o*"))) == (2, [])
    assert "'o\\necho\\n#': a job file names it in a comment" in err


def test_a_job_file_can_be_a_pipe(here, fedhpc):
    assert fedhpc("submit", "my reviews.yaml", "--scheduler", "pbs", "--dry-run", "--out", "/dev/null")[0] == 0


def test_a_file_that_is_not_its_own_is_not_overwritten(here, fedhpc):
    command = ("submit", "my reviews.yaml", "--scheduler", "pbs", "--dry-run", "--out", "job")
    assert fedhpc(*command)[0] == 0
    assert fedhpc(*command, "--time", "1h")[0] == 0
    (here / "job").write_text("#!/bin/bash\necho mine\n")
    status, _, err = fedhpc(*command)
    assert (status, (here / "job").read_text()) == (2, "#!/bin/bash\necho mine\n")
    assert "--out: job is there already, and not written by `fedhpc submit`" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "--scheduler: there is no flux or sbatch or qsub or bsub on PATH (found here: no scheduler)"),
        ("--scheduler pbs", "--scheduler pbs: there is no qsub on PATH (found here: no scheduler)"),
        (
            "--scheduler pbs --dry-run --ranks 9 --nodes 2 --ranks-per-node 4",
            "--ranks 9: 2 nodes with 4 ranks each (--ranks-per-node) have room for 8",
        ),
        ("--scheduler pbs --dry-run --ranks 2 --nodes 3", "--nodes 3: 2 ranks leave nodes without any"),
        ("--scheduler pbs --dry-run --time 1m", "--time: 60 s, but the run stops 60 s before the end"),
        ("--scheduler flux --dry-run --memory 64G", "--memory: Flux shares nodes by cores and GPUs; leave it out"),
        ("--scheduler none --dry-run --time 1h", "--time: without a scheduler nobody limits or counts it"),
        ("--scheduler none --dry-run --chain 2", "--nodes and --chain need a scheduler"),
        ("--scheduler pbs --dry-run --set seed=x", "seed: "),
        ("--scheduler pbs --dry-run --out bin", "--out: "),
    ],
)
def test_what_cannot_be_is_refused_with_one_message(here, fedhpc, options, message):
    status, out, err = fedhpc("submit", "my reviews.yaml", *options.split())
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("error: ") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--scheduler torque", "argument --scheduler: invalid choice: 'torque'"),
        (
            "--time soon",
            "argument --time/--walltime: must be HOURS:MINUTES:SECONDS, DAYS-HOURS:MINUTES:SECONDS, or with units",
        ),
        ("--time 90", "as 1d12h30m, found '90'"),
        ("--time 1:30", "found '1:30'"),
        ("--time 400d", "at most 365 days, found '400d'"),
        ("--time 0s", "more than nothing"),
        ("--memory 64", "argument --memory/--mem: must be whole gigabytes or terabytes, as 64G or 1T, found '64'"),
        ("--nodes 0", "argument --nodes: must be a whole number from 1 to 100000, found '0'"),
        ("--gpus-per-node 1000", "argument --gpus-per-node: must be a whole number from 1 to 64, found '1000'"),
        ("--ranks 1.5", "argument --ranks: must be a whole number from 1 to 1000000, found '1.5'"),
        ("--queue a\nb", "argument --queue/--partition: must be one word"),
        ("--account a;b", "argument --account: must be one word"),
    ],
)
def test_what_cannot_be_typed_is_refused(here, capfd, options, message):
    with pytest.raises(SystemExit) as raised:
        cli.main(["submit", "my reviews.yaml", *options.split(" ")])
    assert raised.value.code == 2
    assert message in capfd.readouterr().err


def test_schedulers_that_are_there_are_named(here, fedhpc):
    put(here, sbatch="", flux="")
    err = fedhpc("submit", "my reviews.yaml", "--scheduler", "lsf")[2]
    assert "--scheduler lsf: there is no bsub on PATH (found here: flux, slurm)" in err


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("24:00:00", 86400),
        ("100:00:01", 360001),
        ("2-12:00:00", 216000),
        ("90m", 5400),
        ("90min", 5400),
        ("1d12h30m", 131400),
        ("30s", 30),
    ],
)
def test_times(text, seconds):
    assert duration(text) == seconds


def test_memory():
    assert [gigabytes(text) for text in ("64G", "64GB", "64gb", "1T")] == [64, 64, 64, 1024]
