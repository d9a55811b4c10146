"""launch.sh under each scheduler but SLURM (tests/slurm): run again, stopped, ended. The ranks' place has a script."""

import signal

import pytest
from stand_ins import END_SIGNALS, JOBS, StandIn

from fedhpc.commands import cli

SCHEDULERS = ("pbs", "lsf", "flux")


@pytest.fixture
def submitted(tmp_path, monkeypatch):
    """Submit a job file of a scheduler's stand-in by `fedhpc submit`, whose runs end with these statuses."""

    def submit(key, statuses, *options):
        cluster = StandIn(tmp_path, key)
        (tmp_path / "statuses").write_text(f"{statuses}\n")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("PATH", cluster.path)
        arguments = ["submit", str(JOBS / "demo.yaml"), "--scheduler", key, "--ranks", "1", "--out", "job", *options]
        if key == "none":
            assert cli.main([*arguments, "--dry-run"]) == 0
            (tmp_path / "queue").write_text("0\tjob\t\n")
        else:
            assert cli.main(arguments) == 0
        return cluster

    return submit


CASES = {
    # name: the exit statuses of its runs, those of its jobs, what the output says last
    "a run that is stopped goes on": ("75 75 0", [75, 75, 0], "fedhpc job: done"),
    "only failures are counted": ("75 1 1", [75, 1, 1], "fedhpc job: failed with 1 for the 2. time, not run again"),
    "a run that never trains is not stopped for ever": (
        "early early",
        [75, 75],
        "fedhpc job: stopped before it trained anything (is the time limit too short?) for the 2. time, not run again",
    ),
    "the user's fault is not repeated": ("2", [2], "fedhpc job: ended with 2, which another run would not mend"),
    "the launcher may fail in a later run": ("75 213 0", [75, 213, 0], "fedhpc job: done"),
}


@pytest.mark.parametrize("key", SCHEDULERS)
@pytest.mark.parametrize("name", CASES)
def test_what_becomes_of_a_job(submitted, tmp_path, key, name):
    statuses, ended, message = CASES[name]
    cluster = submitted(key, statuses)
    assert cluster.run_all() == ended, cluster.output
    assert cluster.output.splitlines()[-1] == message
    assert (tmp_path / "restarts").read_text().split() == [str(number) for number in range(len(ended))]
    assert not list(tmp_path.glob("fedhpc-*"))


def test_a_job_file_of_pbs_is_submitted_again(submitted):
    cluster = submitted("pbs", "75 75 0")
    cluster.run_all()
    assert cluster.asked() == [
        "qsub job",
        "qsub -W depend=afterany:1.server -v FEDHPC_FIRST_JOB=1.server job",
        "qsub -W depend=afterany:2.server -v FEDHPC_FIRST_JOB=1.server job",
    ]
    assert "fedhpc job: stopped; goes on as job 2.server\n" in cluster.output


@pytest.mark.parametrize(("manager", "ended"), [(True, [75, 0]), (False, [75])])
def test_a_job_of_an_array_of_pbs_needs_a_manager(submitted, tmp_path, manager, ended):
    if manager:
        (tmp_path / "manager").touch()
    cluster = submitted("pbs", "75 0")
    (tmp_path / "queue").write_text("1[3].server\tjob\t\n")
    assert cluster.run_all() == ended
    assert cluster.asked() == ["qsub job", "qrerun 1[3].server"]
    assert ("PBS does not requeue it: submit it again to go on" in cluster.output) is not manager


def test_flux_is_given_the_job_file_again_by_the_instance_above(submitted):
    cluster = submitted("flux", "75 0")
    assert cluster.run_all() == [75, 0]
    assert [line for line in cluster.asked() if "batch" in line] == [
        "flux batch job",
        "flux --parent batch --dependency=afterany:f1 job",
    ]


def test_without_a_scheduler_a_failed_run_is_run_again_here(submitted, tmp_path):
    cluster = submitted("none", "1 0")
    assert cluster.run_all() == [0]
    assert "fedhpc job: failed with 1; run again\n" in cluster.output
    assert (tmp_path / "restarts").read_text().split() == ["0", "1"]
    assert not list(tmp_path.glob("fedhpc-*"))


@pytest.mark.parametrize("key", [*SCHEDULERS, "none"])
def test_a_job_that_is_ended_stops_and_is_not_run_again(submitted, tmp_path, key):
    cluster = submitted(key, "wait 0")
    assert cluster.signal_waiting(cluster.next_job(), END_SIGNALS[key]) == 75, cluster.output
    assert cluster.output.splitlines()[-1].endswith(", with 75")
    assert cluster.next_job() is None
    assert not list(tmp_path.glob("fedhpc-*"))


@pytest.mark.parametrize("key", ["lsf", "flux"])  # PBS does not warn
def test_a_warning_before_the_time_limit_stops_a_run_that_goes_on(submitted, key):
    cluster = submitted(key, "wait 0")
    assert cluster.signal_waiting(cluster.next_job(), signal.SIGUSR1) == 75, cluster.output
    assert "SIGUSR1: asking the ranks to stop" in cluster.output
    assert cluster.run_all() == [0]


@pytest.mark.parametrize("key", SCHEDULERS)
def test_jobs_of_a_chain_leave_it_to_the_next(submitted, key):
    cluster = submitted(key, "75 1 0", "--chain", "3")
    assert cluster.run_all() == [75, 1, 0]
    assert cluster.output.count("the next job of the chain goes on") == 2
    assert not [line for line in cluster.asked() if "afterany" in line or "requeue" in line or "qrerun" in line]


@pytest.mark.parametrize("key", SCHEDULERS)
def test_more_ranks_than_the_job_has_room_for_are_refused(submitted, key):
    cluster = submitted(key, "0", "--ranks", "9")
    assert cluster.run_all(LAUNCH="") == [2]
    assert "fedhpc job: 9 ranks are asked for (FEDHPC_RANKS), but the job has room for " in cluster.output


AGENTS = {"pbs": "pbs_tmrsh", "lsf": "blaunch", "flux": "ssh"}


@pytest.mark.parametrize("key", SCHEDULERS)
def test_on_several_nodes_any_mpi_finds_them(submitted, tmp_path, key):
    cluster = submitted(key, "0", "--ranks", "4", "--nodes", "2")
    (tmp_path / "bin/ssh").write_text("")
    (tmp_path / "bin/ssh").chmod(0o755)
    (tmp_path / "nodes").write_text("n1\nn2\n" if key == "flux" else "n1\nn1\nn2\nn2\n")
    mpirun = tmp_path / ".venv/bin/mpirun"
    mpirun.parent.mkdir(parents=True)
    mpirun.write_text('#!/bin/sh\nenv; cp "$FEDHPC_HOSTS" hosts; exit 2\n')
    mpirun.chmod(0o755)
    assert cluster.run_all(LAUNCH="") == [2]
    found = dict(line.partition("=")[::2] for line in cluster.output.splitlines())
    names = ("PRTE_MCA_prte_default_hostfile", "OMPI_MCA_orte_default_hostfile", "HYDRA_HOST_FILE")
    assert {found[name] for name in names} == {found["FEDHPC_HOSTS"]}
    assert (tmp_path / "hosts").read_text().split() == ["n1", "n1", "n2", "n2"]
    assert found["PRTE_MCA_plm_ssh_agent"] == AGENTS[key]
