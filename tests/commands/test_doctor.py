"""fedhpc doctor: what it says of sites that are well, and of surroundings that are broken for real or by hand."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from mpi import launch as ranks

from fedhpc.commands.doctor import gpus, launch, limits, memory, storage, surroundings, versions
from fedhpc.commands.doctor.finding import OK, PROBLEM, WARNING, Finding, Report, by_value, rank_words
from fedhpc.config.file import load_config
from fedhpc.errors import ConfigError
from fedhpc.exchange import Survey, launch_problem
from fedhpc.job import container as containers
from fedhpc.job.environment import job_environment
from fedhpc.job.lock import RunLock, check_seen

HOSTS = {0: "a", 1: "a", 2: "b"}


def named(findings, name):
    (found,) = [each for each in findings if each.name == name]
    return found


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


# The command


def test_alone(fedhpc, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = fedhpc("doctor", "runs/new", "--json", "report.json")
    found = json.loads((tmp_path / "report.json").read_text())
    assert (status, err) == (0, ""), out
    assert (found["ranks"], found["problems"], found["run_dir"]) == (1, 0, "runs/new")
    assert {"versions", "memory", "file system", "batch job"} <= {each["subject"] for each in found["findings"]}
    assert all(each["value"].splitlines()[0] in out for each in found["findings"])
    assert os.listdir(tmp_path) == ["report.json"]  # nothing is left behind


def test_ranks_report_as_one(tmp_path):
    arguments = ["-m", "fedhpc", "doctor", tmp_path / "run", "--json", tmp_path / "report.json"]
    done = ranks.mpirun(3, *arguments, timeout_s=120)
    found = json.loads((tmp_path / "report.json").read_text())
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("versions\n") == 1
    assert (found["ranks"], list(found["hosts"].values())) == (3, [[0, 1, 2]])
    said = {(each["subject"], each["name"]): each for each in found["findings"]}
    assert "3 ranks" in said["memory", "shared by ranks"]["value"]
    assert said["file system", "append seen"]["verdict"] == OK
    assert "MB/s" in next(each["value"] for (subject, _), each in said.items() if subject == "network")


SILENT = """
import os, signal, sys
from fedhpc.commands.doctor import doctor, examination
examination.ANSWER_S = 2.0
if os.environ.get("PMIX_RANK", os.environ.get("PMI_RANK")) == "1":
    examination._facts = lambda subjects: os.kill(os.getpid(), signal.SIGSTOP)
sys.exit(doctor(None, None))
"""


def test_a_rank_that_does_not_answer_is_named(tmp_path):
    done = ranks.mpirun(2, "-c", SILENT, timeout_s=120)
    assert done.returncode != 0
    assert "PROBLEM  ranks without answer" in done.stdout, done.stdout + done.stderr
    assert "rank 1 on " in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["missing.yaml"], "missing.yaml"), (["--json", "no/such/report.json"], "--json: no/such/report.json")],
)
def test_bad_arguments(fedhpc, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    status, out, err = fedhpc("doctor", *arguments)
    assert (status, out) == (2, "")
    assert words in err


def test_a_configuration_says_what_is_needed(world):
    from fedhpc.commands.doctor import _target

    config = load_config(world)
    found = _target(str(world))
    assert (found.folder, found.threads, found.dtype) == (config.run_dir, config.device.threads, config.model.dtype)


def test_the_report_counts():
    report = Report()
    for finding in (Finding("a", "x", "1", PROBLEM, "mend"), Finding("a", "x", "2"), Finding("b", "y", "3", WARNING)):
        report.add(finding)  # the second replaces the first
    assert report.text("title").endswith("0 problems, 1 warning")
    assert "mend" not in report.text("title")


def test_values_of_ranks_in_words():
    assert by_value({0: "x", 1: "x"}) == "x"
    assert by_value({0: "x", 1: "y", 2: "x"}) == "ranks 0, 2: x; rank 1: y"
    assert rank_words([0, 1, 2, 5]) == "ranks 0-2, 5"


# Nothing hangs


@pytest.mark.parametrize(
    ("work", "words"),
    [
        (lambda tell: os.kill(os.getpid(), signal.SIGKILL), "start: the process was ended by SIGKILL"),
        (lambda tell: (tell.doing("a nap", 0), time.sleep(60)), "a nap: no end of this within its time"),
        (lambda tell: (tell.doing("a rest", 0), os.kill(os.getpid(), signal.SIGSTOP)), "the process was stopped"),
        (lambda tell: tell.end(), None),
    ],
)
def test_what_becomes_of_a_child_is_said(monkeypatch, work, words):
    monkeypatch.setattr(limits, "SLACK_S", 0.3)
    monkeypatch.setattr(limits, "END_S", 0.1)
    before = signal.getsignal(signal.SIGTERM)
    with limits.supervise(work, lambda message: None) as problem:
        assert problem == words or words in problem
    signal.signal(signal.SIGTERM, before)


def test_a_check_that_hangs_is_left_behind():
    assert limits.attempt(0.1, lambda: time.sleep(30)) == {"error": "no end within 0.1 s"}
    assert limits.attempt(5, lambda: {"fine": 1}) == {"fine": 1}


# Versions and launcher


def test_hosts_with_other_versions():
    mine = {**versions.facts(), "host": "a"}
    assert {each.verdict for each in versions.check({0: mine, 1: mine})} == {OK}
    found = list(versions.check({0: mine, 1: {**mine, "torch": "1.0", "processor": "other", "h5py": None}}))
    assert named(found, "torch").verdict == named(found, "h5py").verdict == PROBLEM
    assert named(found, "processor").verdict == WARNING


@pytest.mark.parametrize(
    ("says", "verdict"),
    [("HYDRA build details:\n    Version:   5.0.2", WARNING), ("mpirun (Open MPI) 5.0.11", OK)],
)
def test_an_mpirun_of_another_mpi(tmp_path, monkeypatch, says, verdict):
    script = tmp_path / "mpirun"
    script.write_text(f"#!/bin/sh\necho '{says}'\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    found = named(launch.check_launcher("Open MPI v5.0.11", launch.launcher_on_path()), "mpirun on PATH")
    assert found.verdict == verdict


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Open MPI v4.1.4, package: Debian OpenMPI", ("Open MPI", "4")),
        ("MPICH Version:      4.3.2", ("MPICH", "4")),
        ("Intel(R) MPI Library 2021.18.1 for Linux* OS", ("Intel MPI", "2021")),
        ("Intel(R) MPI Library for Linux* OS, Version 2021.18.1 Build", ("Intel MPI", "2021")),
        ("srun", None),
    ],
)
def test_kinds_of_mpi(text, kind):
    assert launch.kind_of(text) == kind


@pytest.mark.parametrize(
    ("affinity", "quota", "threads", "words"),
    [
        ([[0], [1], [2]], None, 1, ""),
        ([[0, 1], [0, 1], [0, 1]], None, 1, ""),  # two device ranks, two cores; the server waits
        ([[0], [0], [0]], None, 1, "2 computing threads share 1 cores"),
        ([[0, 1, 2, 3]] * 3, 1.0, 1, "share 1 cores"),
        ([[0], [1], [2]], None, 2, "device.threads: 2"),
    ],
)
def test_cores_for_all(affinity, quota, threads, words):
    common = {"container": None, "cores": 4, "library": "MPICH Version: 4", "ulfm": False, "quota": quota, "host": "a"}
    facts = {rank: {**common, "affinity": cores} for rank, cores in enumerate(affinity)}
    found = named(launch.check(facts, threads), "cores of a")
    assert (found.verdict == WARNING) is bool(words)
    assert words in found.advice


def test_ranks_that_spin():
    assert launch.check_idle({1: 0.02, 2: 0.03}).verdict == OK
    assert "rank 2" in launch.check_idle({1: 0.02, 2: 0.99}).advice


def test_a_container_without_the_launchers_variables(monkeypatch):
    environment = job_environment({"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4"})
    monkeypatch.setattr(containers, "FILES", {})
    monkeypatch.setattr(containers, "CGROUPS", {})
    assert "container" not in launch_problem(environment, 1)
    monkeypatch.setenv("APPTAINER_CONTAINER", "/image.sif")
    assert "container (Apptainer)" in launch_problem(environment, 1)
    assert launch_problem(job_environment({}), 1) is None
    monkeypatch.setattr(containers, "LAUNCHERS", [open(f"/proc/{os.getppid()}/comm").read().strip()])  # noqa: SIM115
    assert "has started this process" in launch_problem(job_environment({}), 1)


# Memory and GPUs


def test_a_full_shared_folder():
    program = "from fedhpc.commands.doctor import memory; import json; print(json.dumps(memory.shared_folder()))"
    mount = 'mount -t tmpfs -o size=1m none /dev/shm || exit 77; exec "$@"'
    command = ["unshare", "--mount", "sh", "-c", mount, "sh", sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        pytest.skip(f"no mount namespace: {done.stderr}")
    shared = json.loads(done.stdout)
    assert shared["error"] == os.strerror(errno.ENOSPC)
    mine = {**memory.facts(), "shared": shared, "host": "a"}
    assert named(memory.check({0: mine, 1: mine}), "/dev/shm of a").verdict == WARNING  # no launcher needs it here


def test_ranks_of_a_host_that_do_not_share():
    places = {rank: {"near": rank == 0} for rank in HOSTS}
    found = memory.check_sharing(places, HOSTS, {})
    assert (found.verdict, found.value.split(" of")[0]) == (WARNING, "rank 1")
    assert memory.check_sharing({0: {"near": True}, 1: {"near": True}}, HOSTS, {1: None}).verdict == OK
    assert memory.check_sharing({}, HOSTS, {1: "other bytes"}).verdict == PROBLEM


CARD = {"build": "12.8", "is_rocm": False, "allotted": True, "machine": 2, "driver": 12080, "host": "a"}
CARDS = [["H", "0"], ["H", "1"]]


@pytest.mark.parametrize(
    ("change", "indices", "words"),
    [
        ({}, {1: 0, 2: 1}, ""),
        ({}, {1: 0, 2: 0}, "take one GPU while others are free"),
        ({"gpus": []}, {1: 0, 2: 0}, "the job sees none"),
        ({"gpus": [], "machine": 0}, {1: 0, 2: 0}, ""),
        ({"build": None}, {1: 0, 2: 1}, "a build for CPUs"),
        ({"allotted": False}, {1: 0, 2: 1}, "was given no GPU"),
        ({"build": "13.0"}, {1: 0, 2: 1}, "needs a driver for CUDA 13.0"),
    ],
)
def test_gpus(change, indices, words):
    facts = {rank: {**CARD, "gpus": CARDS, **change} for rank in range(3)}
    (found,) = gpus.check(facts, {0: 0, **indices})
    assert words in found.advice
    assert bool(found.advice) is bool(words)


# The file system


def examine(folder, *, is_asked_for=True):
    return list(storage.examine(str(folder), Survey(), {0: "a"}, is_asked_for=is_asked_for))


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(storage, "TEST_BYTES", 1 << 20)


def test_a_file_system_that_does(tmp_path, quick):
    found = examine(tmp_path / "run" / "new")
    assert PROBLEM not in {each.verdict for each in found}
    assert named(found, "locks").value == "hold"
    assert os.listdir(tmp_path) == []


def test_locks_that_fail(tmp_path, quick, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert named(examine(tmp_path), "locks").verdict == WARNING


def test_locks_that_nobody_sees(tmp_path, quick, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    assert "rank 0 can lock what rank 0 has locked" in named(examine(tmp_path), "locks").value


def test_a_read_only_folder(tmp_path, unprivileged):
    tmp_path.chmod(0o555)
    assert named(examine(tmp_path / "run"), "writing").verdict == PROBLEM
    assert named(examine(tmp_path, is_asked_for=False), "writing").verdict == WARNING
    tmp_path.chmod(0o755)


def test_a_slow_file_system(tmp_path, quick, monkeypatch):
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (time.sleep(0.1), fsync(file)))
    assert named(examine(tmp_path), "64 MB written, with fsync").verdict == WARNING


def test_what_another_host_sees(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "SEEN_S", 0.2)
    file = tmp_path / "mark"
    assert storage.see(str(file), "x") == {"seen_s": None, "error": os.strerror(errno.ENOENT)}
    file.write_text("x")
    assert storage.see(str(file), "x")["seen_s"] < 0.2
    assert storage.see(str(file), "y") == {"seen_s": None, "error": "an older text"}


# Home, clocks


def test_a_home_that_cannot_be_written(tmp_path, monkeypatch, unprivileged):
    tmp_path.chmod(0o555)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    found = list(surroundings.check({0: surroundings.facts()}))
    assert named(found, "home").verdict == named(found, "HF_HOME").verdict == WARNING
    tmp_path.chmod(0o755)


def test_clocks_apart():
    assert surroundings.check_clocks({2: (0.3, 0.1)}, HOSTS).verdict == OK
    found = surroundings.check_clocks({2: (-60.0, 0.1)}, HOSTS)
    assert (found.verdict, found.value) == (WARNING, "b -60.0 s")


def test_the_time_that_a_job_has_left():
    soon = job_environment({"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": str(int(time.time()) + 120)})
    assert named(surroundings.job(soon), "time limit").verdict == WARNING
    later = job_environment({"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": str(int(time.time()) + 7200)})
    assert named(surroundings.job(later), "time limit").verdict == OK


# What a run refuses


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EPERM])
def test_a_run_needs_files_that_take_the_place_of_others(world, tmp_path, monkeypatch, code):
    def replace(*_):
        raise OSError(code, os.strerror(code))

    from fedhpc.server.job import check_run_dir

    config = load_config(world, [f"run_dir={tmp_path / 'run'}"])
    check_run_dir(config)
    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(ConfigError, match=r"run_dir: .*cannot take the place of others.*choose a run_dir"):
        check_run_dir(config)


def test_a_run_needs_one_folder_on_all_hosts(tmp_path, monkeypatch):
    monkeypatch.setattr("fedhpc.job.lock.SEEN_S", 0.1)
    with RunLock(tmp_path, job_environment({})):
        assert check_seen(tmp_path, "node2") == check_seen(tmp_path, "node2")
    with pytest.raises(ConfigError, match="not there on node2: the hosts see different folders"):
        check_seen(tmp_path, "node2")
