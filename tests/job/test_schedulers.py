"""PBS, LSF and Flux as the run sees them: their environment, and what their commands say (SLURM: test_jobenv.py)."""

import json
import os
import time
from dataclasses import asdict, replace

import pytest
from stand_ins import JOBS

from fedhpc.errors import ConfigError
from fedhpc.job.environment import SCHEDULERS, job_environment
from fedhpc.job.lock import Owner, RunLock

JOB = {
    "pbs": {"PBS_JOBID": "7.server"},
    "lsf": {"LSB_JOBID": "7", "LSB_JOBINDEX": "0", "LSF_ENVDIR": "/lsf/conf"},
    "flux": {"FLUX_ENCLOSING_ID": "f7"},
}
OTHER = {"pbs": "6.server", "lsf": "6", "flux": "f6"}
PROGRAM = {"pbs": "qstat", "lsf": "bjobs", "flux": "flux"}
KEYS = sorted(JOB)


@pytest.fixture
def answering(tmp_path):
    """A job of a scheduler whose command runs a script, and writes down what it was asked."""

    def write(key, script, **environ):
        path = tmp_path / "bin" / PROGRAM[key]
        path.parent.mkdir(exist_ok=True)
        path.write_text(f'#!/bin/sh\necho "$*" >>{tmp_path}/asked\n{script}\n')
        path.chmod(0o755)
        return job_environment({"PATH": f"{path.parent}:{os.environ['PATH']}", **JOB[key], **environ})

    return write


def in_json(**job):
    return f"echo '{json.dumps({'Jobs': {'7.server': job}})}'"


@pytest.mark.parametrize(
    ("environ", "title"),
    [
        ({}, "no batch job"),
        ({"SLURM_JOB_ID": "7"}, "SLURM job 7"),
        ({"PBS_JOBID": "7.server"}, "PBS job 7.server"),
        ({"PBS_JOBID": "7[3].server"}, "PBS job 7[3].server"),
        ({"LSB_JOBID": "7"}, "LSF job 7"),
        ({"LSB_JOBID": "7", "LSB_JOBINDEX": "0"}, "LSF job 7"),
        ({"LSB_JOBID": "7", "LSB_JOBINDEX": "3"}, "LSF job 7[3]"),
        ({"FLUX_ENCLOSING_ID": "f7"}, "Flux job f7"),
        ({"FLUX_ENCLOSING_ID": "f7", "FLUX_JOB_ID": "f1"}, "Flux job f7"),  # flux run in the job
        ({"FLUX_JOB_ID": "f1"}, "Flux job f1"),
        ({"FLUX_URI": "local:///run/flux/local"}, "no batch job"),  # a login node
    ],
)
def test_the_job_in_words(environ, title):
    assert job_environment(environ).title == title


def test_numbers_are_those_of_one_cluster():
    clusters = {job_environment(environ).cluster for environ in JOB.values()}
    assert clusters == {"PBS server", "LSF /lsf/conf", None}, "Flux's numbers are random ones"


@pytest.mark.parametrize("key", KEYS)
def test_the_job_file_says_how_many_ranks_and_which_run_this_is(key):
    job = job_environment(JOB[key])
    assert (job.ranks_asked, job.restarts) == (1, 0)
    job = job_environment({**JOB[key], "FEDHPC_RANKS": "17", "FEDHPC_RESTARTS": "2"})
    assert (job.ranks_asked, job.restarts) == (17, 2)
    assert job.launch_problem(17, has_mpi=True) is None
    problem = job.launch_problem(1, has_mpi=False)
    assert problem.startswith(f"a single process was started in a job for 17 ranks ({job.title})")


def test_the_node_file_of_pbs_has_a_line_for_each_rank(tmp_path):
    (tmp_path / "nodes").write_text("n1\nn1\nn2\n")
    assert job_environment({**JOB["pbs"], "PBS_NODEFILE": str(tmp_path / "nodes")}).ranks_asked == 3


def test_tasks_of_flux_that_do_not_find_each_other_are_refused():
    task = {"FLUX_JOB_ID": "f1", "FLUX_JOB_SIZE": "3", "FLUX_TASK_RANK": "1", "FLUX_TASK_LOCAL_ID": "1"}
    job = job_environment(task)
    assert job.launch_problem(1, has_mpi=True).startswith("flux run started 3 tasks, but MPI sees 1 of them")
    assert job.launch_problem(3, has_mpi=True) is None
    assert not job.is_first_task
    assert job.gpu_index(0, 4) == 1, "Flux's number"
    assert job_environment({**task, "OMPI_COMM_WORLD_SIZE": "3"}).launch_problem(1, has_mpi=True) is None


@pytest.mark.parametrize("key", [*KEYS, "slurm"])
def test_gpus_that_the_job_asked_for_and_has_not(key):
    job = job_environment({**JOB.get(key, {"SLURM_JOB_ID": "7"}), "FEDHPC_GPUS_PER_NODE": "4"})
    assert job.gpus_allotted or key == "slurm"
    assert job.gpu_problem(4) is None
    for count in (0, 3):
        problem = job.gpu_problem(count)
        assert problem.startswith("FEDHPC_GPUS_PER_NODE: the job file asked for 4 GPUs on each node")
        assert f"but {count} can be used here, in {job.title} (CUDA_VISIBLE_DEVICES: not set)" in problem
    assert job_environment(JOB.get(key, {"SLURM_JOB_ID": "7"})).gpu_problem(0) is None


def test_a_job_of_one_scheduler_within_one_of_another():
    both = {"SLURM_JOB_ID": "77", "FLUX_ENCLOSING_ID": "fABC"}
    assert job_environment(both).job_id == "fABC"
    assert job_environment(both | {"FEDHPC_SCHEDULER": "slurm"}).job_id == "77"
    assert job_environment(both | {"FEDHPC_SCHEDULER": "none"}).job_id is None


STARTED = "ten minutes ago"
TIMES = [
    # what the command says, seconds that are left of it
    ("pbs", in_json(stime=STARTED, Resource_List={"walltime": "01:00:00"}), 3000),
    ("pbs", in_json(stime=STARTED, Resource_List={"walltime": "100:00:00"}), 359400),
    ("pbs", in_json(stime=STARTED, Resource_List={"walltime": "00:05:00"}), 0),
    ("pbs", in_json(stime=STARTED, Resource_List={}), None),
    ("pbs", in_json(), None),
    ("pbs", "echo not JSON", None),
    ("pbs", "echo '[]'", None),
    ("pbs", "exit 1", None),
    ("lsf", "echo '1:23 L'", 4980),
    ("lsf", "echo '0:00 L'", 0),
    ("lsf", "echo '1:23 E'", None),  # an estimate
    ("lsf", "echo -", None),
    ("lsf", "exit 255", None),
    ("flux", "echo 593", 593),
    ("flux", "echo 0", 0),
    ("flux", "echo 4294967295", None),  # no limit
    ("flux", "exit 1", None),
]


@pytest.mark.parametrize(("key", "script", "seconds"), TIMES, ids=range(len(TIMES)))
def test_the_time_that_is_left(answering, key, script, seconds):
    started = time.strftime("%a %b %d %H:%M:%S %Y", time.localtime(time.time() - 600))
    left = answering(key, script.replace(STARTED, started)).seconds_left()
    assert left is seconds if seconds is None else left == pytest.approx(seconds, abs=30)


STATES = [
    *(("pbs", in_json(job_state=state), True) for state in "RESU"),
    *(("pbs", in_json(job_state=state), False) for state in "QHWFXMT"),
    ("pbs", "echo 'qstat: Unknown Job Id 6.server' >&2; exit 153", False),
    ("pbs", "echo 'qstat: cannot connect to server' >&2; exit 111", None),
    *(("lsf", f"echo {state}", True) for state in ("RUN", "SSUSP", "USUSP", "PROV")),
    *(("lsf", f"echo {state}", False) for state in ("PEND", "PSUSP", "WAIT", "DONE", "EXIT")),
    *(("lsf", f"echo {state}", None) for state in ("UNKWN", "ZOMBI", "some words")),
    ("lsf", "echo 'Job <6> is not found' >&2; exit 255", None),  # forgotten, perhaps
    *(("flux", f"echo {state}", True) for state in ("RUN", "CLEANUP")),
    *(("flux", f"echo {state}", False) for state in ("SCHED", "COMPLETED", "FAILED", "CANCELED", "TIMEOUT")),
    ("flux", "echo flux-jobs: ERROR: JobID f6 unknown >&2; exit 1", None),
]


@pytest.mark.parametrize(("key", "script", "runs"), STATES)
def test_whether_another_job_runs(answering, key, script, runs):
    assert answering(key, script).job_runs(OTHER[key]) is runs


@pytest.mark.parametrize("key", KEYS)
def test_the_commands_are_called_as_the_manuals_have_it(answering, tmp_path, key):
    job = answering(key, "exit 1")
    job.seconds_left()
    job.job_runs(OTHER[key])
    assert (tmp_path / "asked").read_text().splitlines() == {
        "pbs": ["-x -f -F json 7.server", "-x -f -F json 6.server"],
        "lsf": ["-a -noheader -o time_left 7", "-a -noheader -o stat 6"],
        "flux": ["--parent job timeleft f7", "--parent jobs --no-header --format={status} f6"],
    }[key]


def test_a_job_of_flux_run_asks_the_instance_that_has_started_it(answering, tmp_path):
    answering("flux", "exit 1", FLUX_ENCLOSING_ID="", FLUX_JOB_ID="f1").seconds_left()
    assert (tmp_path / "asked").read_text() == "job timeleft f1\n"


RUNS = {"pbs": in_json(job_state="R"), "lsf": "echo RUN", "flux": "echo RUN"}
ENDED = {"pbs": in_json(job_state="F"), "lsf": "echo EXIT", "flux": "echo CANCELED"}


@pytest.mark.parametrize("key", KEYS)
def test_the_lock_of_a_job_is_kept_while_the_scheduler_runs_it(answering, tmp_path, key):
    owner = Owner.this_process(answering(key, ""))
    left = replace(owner, job_id=OTHER[key], machine="another", host="n5", pid=4711, title="that job")
    lock = tmp_path / "lock"
    lock.write_text(json.dumps(asdict(left)))
    with pytest.raises(ConfigError, match="is in use by that job, process 4711 on n5"):
        RunLock(tmp_path, answering(key, RUNS[key]), watch_s=60).acquire()
    with RunLock(tmp_path, answering(key, ENDED[key]), watch_s=60) as held:
        assert held.notice.endswith("that job has ended")
    lock.write_text(json.dumps(asdict(replace(left, job_id=owner.job_id))))
    with RunLock(tmp_path, answering(key, "", FEDHPC_RESTARTS="1"), watch_s=60) as held:
        assert held.notice.endswith("that job was requeued")


def test_launch_sh_looks_for_the_schedulers_in_the_same_order():
    text = (JOBS / "launch.sh").read_text()
    places = [text.index(f"part={key}") for key in SCHEDULERS]
    assert places == sorted(places)
