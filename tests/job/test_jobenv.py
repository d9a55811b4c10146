import os
import time

import pytest

from fedhpc.errors import UserError
from fedhpc.exchange import connect
from fedhpc.job.environment import start_ticks
from fedhpc.job.schedulers import base
from fedhpc.job.schedulers.slurm import SlurmEnvironment as JobEnvironment
from fedhpc.job.stopping import StopRequest

BATCH = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "17", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
STEP = {**BATCH, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "17", "SLURM_PROCID": "5", "SLURM_LOCALID": "3"}
# A rank of mpirun on several nodes inherits the variables of the step that runs mpirun's two daemons.
UNDER_DAEMON = {**STEP, "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}
OPEN_MPI = {**UNDER_DAEMON, "OMPI_COMM_WORLD_SIZE": "17", "OMPI_COMM_WORLD_RANK": "9", "PMIX_RANK": "9"}
MPICH = {**UNDER_DAEMON, "MPI_LOCALNRANKS": "9", "PMI_SIZE": "17", "PMI_RANK": "9"}
HET = {**BATCH, "SLURM_NTASKS": "1", "SLURM_NTASKS_HET_GROUP_0": "1", "SLURM_NTASKS_HET_GROUP_1": "16"}


@pytest.fixture
def squeue(tmp_path):
    """Put a squeue on PATH; the environment that finds it."""

    def write(script, **environ):
        path = tmp_path / "squeue"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return JobEnvironment({"PATH": f"{tmp_path}:{os.environ['PATH']}", **environ})

    return write


def test_without_slurm_everything_has_its_plain_answer():
    job = JobEnvironment({})
    assert (job.job_id, job.title, job.cluster, job.restarts, job.local_id) == (None, "no batch job", None, 0, 0)
    assert not job.is_step
    assert job.is_first_task
    assert job.gpus_allotted
    assert job.seconds_left() is None
    assert job.launch_problem(1, has_mpi=False) is None


def test_by_default_the_environment_of_this_process(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    job = JobEnvironment()
    assert (job.job_id, job.restarts) == ("41", 3)
    assert "41" not in repr(job), "an environment may hold secrets"


@pytest.mark.parametrize("value", ["", "x", "-1", "1.5", "9" * 30, "٣"])
def test_senseless_numbers_are_as_good_as_none(value):
    job = JobEnvironment({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": value, "SLURM_STEP_ID": value})
    assert job.restarts == 0
    assert not job.is_step


def test_an_array_task_has_a_number_of_its_own_and_one_that_squeue_shows():
    job = JobEnvironment({"SLURM_JOB_ID": "121", "SLURM_ARRAY_JOB_ID": "120", "SLURM_ARRAY_TASK_ID": "4"})
    assert job.job_id == "121"
    assert job.title == "SLURM job 121 (array task 120_4)"
    assert JobEnvironment({"SLURM_JOB_ID": "7"}).title == "SLURM job 7"


@pytest.mark.parametrize(
    ("environ", "is_step"),
    [
        (BATCH, False),
        (STEP, True),
        ({**BATCH, "SLURM_STEP_ID": "4294967291"}, False),  # the batch script, in some versions
        ({**BATCH, "SLURM_STEP_ID": "4294967290"}, False),  # the shell of salloc
        ({**BATCH, "SLURM_STEP_ID": "batch"}, False),
        (OPEN_MPI, False),
        (MPICH, False),
        ({**UNDER_DAEMON, "MV2_COMM_WORLD_SIZE": "17"}, False),
    ],
)
def test_a_step_is_what_srun_started_itself(environ, is_step):
    assert JobEnvironment(environ).is_step is is_step


@pytest.mark.parametrize(
    ("environ", "first"),
    [
        ({}, True),
        (BATCH, True),
        (STEP, False),
        ({**STEP, "SLURM_PROCID": "0"}, True),
        (OPEN_MPI, False),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_RANK": "0"}, True),
        ({**MPICH, "SLURM_PROCID": "0"}, False),
    ],
)
def test_one_process_of_a_launch_speaks(environ, first):
    assert JobEnvironment(environ).is_first_task is first


@pytest.mark.parametrize(("size", "has_mpi"), [(1, False), (1, True), (8, True)])
def test_srun_tasks_that_do_not_find_each_other_are_refused(size, has_mpi):
    problem = JobEnvironment(STEP).launch_problem(size, has_mpi)
    assert problem.startswith(f"srun started 17 tasks, but MPI sees {size} of them")
    for remedy in ("--mpi=pmix", "--mpi=pmi2", "srun --mpi=list", "mpirun"):
        assert remedy in problem


@pytest.mark.parametrize(
    ("environ", "library", "missing"),
    [
        (STEP, "/no/libpmi2.so", True),
        (STEP, __file__, True),
        (STEP, "libc.so.6", False),
        (STEP, "", False),
        (BATCH, "/no/libpmi2.so", False),
        (MPICH, "/no/libpmi2.so", False),  # Intel's mpirun brings its own
    ],
)
def test_what_intel_mpi_needs_under_srun_is_there(environ, library, missing):
    problem = JobEnvironment({**environ, "I_MPI_PMI_LIBRARY": library}).pmi_problem()
    assert (problem is not None) is missing
    if missing:
        assert problem.startswith(f"I_MPI_PMI_LIBRARY: {library}: ")
        assert "libpmi2.so of this SLURM" in problem


@pytest.mark.parametrize(("environ", "tasks"), [(BATCH, 17), (HET, 17)])
def test_a_single_process_in_an_allocation_for_many_is_refused(environ, tasks):
    problem = JobEnvironment(environ).launch_problem(1, has_mpi=False)
    assert f"an allocation of {tasks} tasks (SLURM job 7)" in problem
    for remedy in ("srun or mpirun", "srun --ntasks=1"):
        assert remedy in problem


@pytest.mark.parametrize(
    ("environ", "size", "has_mpi"),
    [
        (BATCH, 17, True),  # mpirun
        (BATCH, 5, True),  # mpirun -np 5
        (BATCH, 1, True),  # mpirun -np 1
        (STEP, 17, True),
        (STEP, 20, True),  # tasks of several components
        ({**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1"}, 1, False),  # srun --ntasks=1
        (HET, 17, True),
        (OPEN_MPI, 17, True),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "1", "SLURM_STEP_NUM_TASKS": "16"}, 1, True),
        (MPICH, 17, True),
        ({"SLURM_JOB_ID": "7"}, 1, False),
        ({"SLURM_NTASKS": "17"}, 1, False),  # a variable that was left, no job
    ],
)
def test_good_launches_pass(environ, size, has_mpi):
    assert JobEnvironment(environ).launch_problem(size, has_mpi) is None


def test_the_job_script_learns_whether_the_ranks_have_found_each_other(tmp_path):
    mark = tmp_path / "started"
    with pytest.raises(UserError, match="an allocation of 17 tasks"):
        connect(StopRequest(), JobEnvironment({**BATCH, "FEDHPC_STARTED": str(mark)}), 60)
    assert not mark.exists()
    connect(StopRequest(), JobEnvironment({"FEDHPC_STARTED": str(mark)}), 60)
    assert mark.exists()


def test_the_end_time_needs_no_question(squeue, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1000.0)
    assert squeue("echo 7 59:59", SLURM_JOB_ID="7", SLURM_JOB_END_TIME="1090").seconds_left() == 90
    assert squeue("echo 7 59:59", SLURM_JOB_ID="7", SLURM_JOB_END_TIME="990").seconds_left() == 0


@pytest.mark.parametrize(
    ("shown", "seconds"),
    [
        ("1-02:03:04", 93784),
        ("2:03:04", 7384),
        ("02:03", 123),
        ("0:00", 0),
        ("365-00:00:00", 31536000),
        ("UNLIMITED", None),
        ("NOT_SET", None),
        ("INVALID", None),
        ("", None),
    ],
)
def test_squeue_tells_the_time_left(squeue, shown, seconds):
    job = squeue(f"echo 7 {shown}", SLURM_JOB_ID="7")
    assert job.seconds_left() == seconds


def test_squeue_is_asked_for_the_job_alone_whatever_the_user_has_set(squeue):
    script = '[ "$*" = "-h -t all -j 7 -o %A %L" ] && [ -z "$SQUEUE_USERS$SLURM_CLUSTERS" ] && echo 7 1:00'
    job = squeue(script, SLURM_JOB_ID="7", SQUEUE_USERS="other", SLURM_CLUSTERS="other")
    assert job.seconds_left() == 60


def test_the_last_task_of_an_array_is_told_from_the_array(squeue):
    job = squeue("printf '9 3:00\\n7 2:00\\n8 1:00\\n'", SLURM_JOB_ID="7")
    assert job.seconds_left() == 120
    assert squeue("printf '9 RUNNING\\n7 FAILED\\n'").job_runs("7") is False


UNKNOWN = "echo slurm_load_jobs error: Invalid job id specified >&2; exit 1"
UNREACHABLE = "echo slurm_load_jobs error: Unable to contact slurm controller >&2; exit 1"


@pytest.mark.parametrize(
    ("script", "runs"),
    [
        ("echo 7 RUNNING", True),
        ("echo 7 COMPLETING", True),
        ("echo 7 SUSPENDED", True),
        ("echo 7 A_STATE_OF_THE_FUTURE", True),
        ("echo 7 PENDING", False),
        ("echo 7 CANCELLED", False),
        ("echo 7 TIMEOUT", False),
        ("echo 7 NODE_FAIL", None),
        ("exit 0", False),
        (UNKNOWN, False),
        (UNREACHABLE, None),
        ("echo 8 RUNNING", None),
        ("echo some words of a wrapper", None),
        ("kill -9 $$", None),
    ],
)
def test_squeue_tells_whether_a_job_runs(squeue, script, runs):
    assert squeue(script).job_runs("7") is runs


def test_no_squeue_no_answer(tmp_path):
    job = JobEnvironment({"PATH": str(tmp_path), "SLURM_JOB_ID": "7"})
    assert job.seconds_left() is None
    assert job.job_runs("7") is None


def test_a_hanging_squeue_is_ended_with_its_children(squeue, tmp_path, monkeypatch):
    monkeypatch.setattr(base, "ANSWER_S", 0.5)
    start = time.monotonic()
    job = squeue(f"sleep 60 & echo $! > {tmp_path}/child; wait; echo 7 1:00", SLURM_JOB_ID="7")
    assert job.seconds_left() is None
    assert time.monotonic() - start < 10
    child = int((tmp_path / "child").read_text())
    while start_ticks(child) is not None:
        assert time.monotonic() - start < 10
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("environ", "allotted"),
    [
        ({}, True),
        ({"CUDA_VISIBLE_DEVICES": "0"}, True),
        (BATCH, False),
        ({**BATCH, "CUDA_VISIBLE_DEVICES": "NoDevFiles"}, False),
        ({**BATCH, "CUDA_VISIBLE_DEVICES": ""}, False),
        ({**BATCH, "SLURM_GPUS_ON_NODE": "0"}, False),
        ({**BATCH, "CUDA_VISIBLE_DEVICES": "0"}, True),
        ({**BATCH, "CUDA_VISIBLE_DEVICES": "GPU-5a9"}, True),
        ({**BATCH, "SLURM_JOB_GPUS": "0"}, True),
        ({**BATCH, "SLURM_STEP_GPUS": "0,1"}, True),
        ({**BATCH, "SLURM_GPUS_ON_NODE": "4"}, True),
        ({**BATCH, "ROCR_VISIBLE_DEVICES": "0"}, True),
    ],
)
def test_gpus_belong_to_a_job_only_if_it_was_given_some(environ, allotted):
    assert JobEnvironment(environ).gpus_allotted is allotted


def test_ranks_of_a_host_take_different_gpus():
    assert [JobEnvironment({}).gpu_index(rank, 4) for rank in range(6)] == [0, 1, 2, 3, 0, 1]
    assert JobEnvironment({}).gpu_index(3, 1) == 0
    assert JobEnvironment({}).gpu_index(3, 0) == 0
    assert JobEnvironment(STEP).gpu_index(0, 8) == 3, "srun's number"
    assert JobEnvironment(STEP).gpu_index(0, 1) == 0, "srun gave each task one"
    assert JobEnvironment(OPEN_MPI).gpu_index(2, 8) == 2, "the daemon's number is 0 for all"


def test_a_process_is_known_by_its_number_and_start():
    assert start_ticks(os.getpid()) == start_ticks(os.getpid()) > 0
    assert start_ticks(1) < start_ticks(os.getpid())
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert start_ticks(child) is None, "a zombie is dead"
    os.waitpid(child, 0)
    assert start_ticks(child) is None
