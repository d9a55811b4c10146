import errno
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from fedhpc.errors import ConfigError
from fedhpc.job import environment as jobenv
from fedhpc.job import lock
from fedhpc.job.environment import job_environment, start_ticks
from fedhpc.job.lock import Owner, RunLock

JOB_7 = {"SLURM_JOB_ID": "7", "SLURM_CLUSTER_NAME": "lab"}
JOB_8 = {"SLURM_JOB_ID": "8", "SLURM_CLUSTER_NAME": "lab"}
LONG_S = 6.0
"""Where a live owner is to be noticed: however slow the machine."""
SHORT_S = 0.3
"""Where the owner is known to be silent."""
HOLDER = """
import json, os, sys, threading, time
from pathlib import Path
from fedhpc.job import environment as jobenv
from fedhpc.job import lock

options = json.loads(sys.argv[1])
if "boot_id" in options:
    jobenv.BOOT_ID = Path(options["boot_id"])
if options.get("no_flock"):
    def flock(*_):
        raise OSError(95, "Operation not supported")
    lock.fcntl.flock = flock
lock.SETTLE_S = options.get("settle_s", 0.1)
held = lock.RunLock(
    options["run_dir"], jobenv.job_environment(options["environ"]), beat_s=options.get("beat_s", 0.05), watch_s=0.3
)
try:
    held.acquire()
except Exception as error:
    print(f"{type(error).__name__}: {error}", flush=True)
    raise SystemExit
print("held", flush=True)
if options.get("fork") and os.fork() == 0:
    held.release()
    print(os.getpid(), flush=True)
    time.sleep(60)
    os._exit(0)
for command in sys.stdin:
    if command == "lost\\n":
        for _ in range(100):
            if held.lost:
                break
            time.sleep(0.05)
        print(held.lost, flush=True)
    elif command == "release\\n":
        held.release()
        print("released", flush=True)
"""


class Holder:
    """A process that holds a lock, or was refused, until it is told to end."""

    def __init__(self, run_dir, environ=None, **options):
        options = {"run_dir": str(run_dir), "environ": environ or {}, **options}
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        self.pid = self.process.pid

    def answer(self, command=None):
        if command:
            self.process.stdin.write(f"{command}\n")
        return self.process.stdout.readline().strip()

    def kill(self):
        self.process.kill()
        self.process.wait()

    def stop(self):
        self.process.send_signal(signal.SIGSTOP)
        while Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            time.sleep(0.01)


@pytest.fixture
def run_dir(tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    return path


@pytest.fixture
def hold(run_dir):
    """Start holders; whatever becomes of the test, none is left."""
    holders = []

    def start(environ=None, expect="held", **options):
        holders.append(Holder(run_dir, environ, **options))
        if expect:
            assert holders[-1].answer() == expect
        return holders[-1]

    yield start
    for holder in holders:
        holder.kill()


@pytest.fixture(autouse=True)
def _settle_soon(monkeypatch):
    monkeypatch.setattr(lock, "SETTLE_S", 0.1)


@pytest.fixture
def elsewhere(tmp_path):
    """The boot id of another machine."""
    path = tmp_path / "other_boot_id"
    path.write_text("11111111-2222-3333-4444-555555555555\n")
    return str(path)


@pytest.fixture
def no_flock(monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.fixture
def squeue(tmp_path):
    """Put a squeue on PATH that writes down what it was asked; the environment of a job of SLURM."""

    def write(script, environ=JOB_8):
        path = tmp_path / "bin" / "squeue"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n{script}\n')
        path.chmod(0o755)
        return {"PATH": f"{path.parent}:{os.environ['PATH']}", **environ}

    return write


def run_lock(run_dir, environ=None, **options):
    return RunLock(run_dir, job_environment(environ or {}), **{"beat_s": 0.05, "watch_s": SHORT_S, **options})


def test_whoever_watches_a_lock_can_attend_to_other_things(tmp_path):
    """Rank 0's other ranks wait meanwhile, and would take it for dead."""
    (tmp_path / "lock").write_bytes(b"somebody")
    looks = []
    with run_lock(tmp_path, progress=lambda: looks.append(time.monotonic())):
        assert len(looks) == lock.LOOKS


def refused(run_dir, environ=None):
    with pytest.raises(ConfigError, match="is in use by") as info:
        run_lock(run_dir, environ, watch_s=LONG_S).acquire()
    return str(info.value)


def leave(run_dir, environ=JOB_7, **changes):
    """The lock file of a process of another machine that is silent."""
    values = {"machine": "another", "host": "n5", "pid": 4711, "start_ticks": 5, **changes}
    owner = replace(Owner.this_process(job_environment(environ)), **values)
    (run_dir / "lock").write_text(json.dumps(asdict(owner)))


def taken_over(run_dir, environ=None):
    """What a run that takes the lock over says."""
    with run_lock(run_dir, environ) as held:
        assert Owner.parse(held.path.read_bytes()).pid == os.getpid()
        return held.notice


def asked(tmp_path):
    path = tmp_path / "asked"
    return path.read_text().splitlines() if path.exists() else []


def test_the_file_says_who_has_the_lock_and_goes_with_it(run_dir):
    held = run_lock(run_dir, JOB_7)
    for _ in range(2):
        with held:
            values = json.loads(held.path.read_text())
            assert values["job_id"] == "7"
            assert values["host"] == socket.gethostname()
            assert values["pid"] == os.getpid()
            assert values["start_ticks"] == start_ticks(os.getpid())
            assert Path("/proc/sys/kernel/random/boot_id").read_text().strip() in values["machine"]
        assert list(run_dir.iterdir()) == []
        held.release()
    assert held.notice is None
    assert not held.lost


def test_an_exception_gives_the_lock_back(run_dir):
    with pytest.raises(ZeroDivisionError), run_lock(run_dir):
        raise ZeroDivisionError
    assert list(run_dir.iterdir()) == []


@pytest.mark.parametrize(("environ", "title"), [({}, "no batch job"), (JOB_7, "SLURM job 7")])
def test_a_second_run_is_refused_and_told_who_has_the_lock(run_dir, hold, environ, title):
    first = hold(environ)
    message = refused(run_dir, JOB_8)
    assert message.startswith(f"run_dir: {run_dir} is in use by {title}, process {first.pid} on {socket.gethostname()}")
    assert "choose another run_dir" in message
    assert "remove" not in message
    assert first.answer("release") == "released"
    assert taken_over(run_dir) is None


def test_a_process_cannot_lock_twice(run_dir):
    with run_lock(run_dir):
        assert f"process {os.getpid()} on" in refused(run_dir)


def test_a_stopped_owner_keeps_the_lock(run_dir, hold):
    first = hold(JOB_7)
    first.stop()
    assert f"process {first.pid}" in refused(run_dir)
    first.process.send_signal(signal.SIGCONT)
    assert first.answer("release") == "released"
    assert not (run_dir / "lock").exists()


@pytest.mark.parametrize("reaped", [True, False])
def test_the_lock_of_a_killed_owner_is_taken_over(run_dir, hold, reaped):
    first = hold(JOB_7)
    first.process.kill()
    os.waitid(os.P_PID, first.pid, os.WEXITED | (0 if reaped else os.WNOWAIT))
    notice = taken_over(run_dir, JOB_8)
    assert notice == (
        f"took over the lock that SLURM job 7, process {first.pid} on {socket.gethostname()} left in {run_dir}: that "
        "process has ended"
    )
    assert not (run_dir / "lock").exists()


def test_an_owner_that_forgets_to_release_ends_nevertheless(run_dir, hold):
    first = hold()
    first.process.stdin.close()
    assert first.process.wait(timeout=30) == 0
    assert "that process has ended" in taken_over(run_dir)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_flock_does_not_stop_a_run(run_dir, monkeypatch, code):
    def flock(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert taken_over(run_dir) is None


def test_a_failing_flock_stops_it(run_dir, monkeypatch):
    def flock(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="Input/output error"):  # not the user's fault: worth another start
        run_lock(run_dir).acquire()


def test_without_flock_the_process_table_decides_on_one_machine(run_dir, hold, no_flock):
    first = hold(JOB_7, no_flock=True)
    message = refused(run_dir)
    assert f"SLURM job 7, process {first.pid}" in message
    assert f"remove {run_dir}/lock if that process is surely dead" in message
    first.stop()
    assert f"process {first.pid}" in refused(run_dir)
    first.kill()
    assert "that process has ended" in taken_over(run_dir)


def test_a_reused_process_number_is_not_the_owner(run_dir):
    here = {"machine": jobenv.machine_id(), "pid": os.getppid()}
    leave(run_dir, start_ticks=start_ticks(os.getppid()), **here)
    assert f"process {os.getppid()} on n5" in refused(run_dir)
    leave(run_dir, start_ticks=start_ticks(os.getppid()) + 1, **here)
    assert "that process has ended" in taken_over(run_dir)


def test_the_process_numbers_of_an_earlier_boot_mean_nothing(run_dir, monkeypatch, elsewhere):
    leave(run_dir, {}, machine=jobenv.machine_id(), pid=os.getppid(), start_ticks=start_ticks(os.getppid()))
    monkeypatch.setattr(jobenv, "BOOT_ID", Path(elsewhere))
    assert "no sign of life for 0.3 s" in taken_over(run_dir)


def test_without_a_boot_id_no_process_number_is_trusted(run_dir, monkeypatch, tmp_path):
    monkeypatch.setattr(jobenv, "BOOT_ID", tmp_path / "missing")
    leave(run_dir, {}, machine=jobenv.machine_id())
    assert "no sign of life" in taken_over(run_dir)


@pytest.mark.parametrize("state", ["RUNNING", "COMPLETING"])
def test_a_job_that_slurm_runs_elsewhere_keeps_the_lock(run_dir, squeue, state):
    leave(run_dir)
    message = refused(run_dir, squeue(f"echo 7 {state}"))
    assert "SLURM job 7, process 4711 on n5" in message


@pytest.mark.parametrize("script", ["echo 7 PENDING", "echo 7 CANCELLED", "echo Invalid job id >&2; exit 1", "exit 0"])
def test_a_job_that_slurm_has_ended_has_lost_the_lock(run_dir, squeue, tmp_path, script):
    leave(run_dir)
    assert taken_over(run_dir, squeue(script)).endswith("that job has ended")
    assert asked(tmp_path) == ["-h -t all -j 7 -o %A %T"]


def test_a_requeued_job_gets_its_own_lock_back(run_dir, squeue, tmp_path):
    leave(run_dir)
    environ = squeue("echo 7 RUNNING", {**JOB_7, "SLURM_RESTART_COUNT": "1"})
    assert taken_over(run_dir, environ).endswith("that job was requeued")
    assert asked(tmp_path) == []


def test_a_second_step_of_a_job_does_not_take_the_lock_of_the_first(run_dir, hold, squeue, elsewhere):
    first = hold(JOB_7, no_flock=True, boot_id=elsewhere)
    assert f"process {first.pid}" in refused(run_dir, squeue("echo 7 RUNNING", JOB_7))
    first.kill()
    assert "no sign of life" in taken_over(run_dir, squeue("echo 7 RUNNING", JOB_7))


@pytest.mark.parametrize("script", ["exit 1", "echo 7 NODE_FAIL", "echo wrapper"])
def test_without_an_answer_of_slurm_the_counter_decides(run_dir, hold, squeue, elsewhere, script):
    first = hold(JOB_7, no_flock=True, boot_id=elsewhere)
    assert f"SLURM job 7, process {first.pid}" in refused(run_dir, squeue(script))
    first.kill()
    assert "no sign of life" in taken_over(run_dir, squeue(script))


@pytest.mark.parametrize("change", [{"cluster": "other"}, {"uid": os.getuid() + 1}])
def test_slurm_is_not_asked_for_jobs_that_it_may_not_show(run_dir, squeue, tmp_path, change):
    leave(run_dir, **change)
    assert "no sign of life" in taken_over(run_dir, squeue("exit 0"))
    assert asked(tmp_path) == []


def test_the_process_table_is_not_asked_for_other_users(run_dir):
    leave(run_dir, {}, machine=jobenv.machine_id(), uid=os.getuid() + 1)
    assert "no sign of life" in taken_over(run_dir)


def test_a_run_elsewhere_without_a_job_is_watched(run_dir, hold, elsewhere):
    first = hold(no_flock=True, boot_id=elsewhere)
    assert f"no batch job, process {first.pid}" in refused(run_dir)
    first.kill()
    assert "no sign of life" in taken_over(run_dir)


def test_an_owner_that_was_given_up_notices_and_leaves_the_lock_alone(run_dir, hold, elsewhere):
    first = hold(no_flock=True, boot_id=elsewhere)
    first.stop()
    with run_lock(run_dir) as held:
        assert "no sign of life" in held.notice
        first.process.send_signal(signal.SIGCONT)
        assert first.answer("lost") == "True"
        assert first.answer("release") == "released"
        assert Owner.parse(held.path.read_bytes()).pid == os.getpid()
        assert not held.lost


@pytest.mark.parametrize("day", [0, 4102444800])
def test_clocks_that_jump_change_nothing(run_dir, hold, elsewhere, monkeypatch, day):
    monkeypatch.setattr(time, "time", lambda: day)
    first = hold(no_flock=True, boot_id=elsewhere)
    dated = threading.Event()

    def date_back_and_forth():
        while not dated.wait(0.002):
            os.utime(run_dir / "lock", (day, day))

    thread = threading.Thread(target=date_back_and_forth)
    thread.start()
    try:
        assert f"process {first.pid}" in refused(run_dir)
        first.kill()
        with run_lock(run_dir) as held:
            assert "no sign of life" in held.notice
            assert f"process {os.getpid()}" in refused(run_dir)
            dated.set()
            thread.join()
    finally:
        dated.set()
        thread.join()


OWNER = Owner.this_process(job_environment(JOB_7))
GARBAGE = {
    "empty": b"",
    "zeros": bytes(lock.RECORD_BYTES),
    "truncated": json.dumps(asdict(OWNER)).encode()[:100],
    "binary": bytes(range(256)),
    "deep": b"[" * 4000,
    "list": b"[1, 2]",
    "field missing": json.dumps({"pid": 1}).encode(),
    "field unknown": json.dumps({**asdict(OWNER), "more": 1}).encode(),
    "wrong type": json.dumps({**asdict(OWNER), "pid": "1"}).encode(),
    "someone's notes": b"do not forget the milk\n" * 500,
}


@pytest.mark.parametrize("record", GARBAGE.values(), ids=GARBAGE.keys())
def test_a_file_that_names_nobody_is_taken_over(run_dir, record):
    (run_dir / "lock").write_bytes(record)
    with run_lock(run_dir) as held:
        assert "an unknown process" in held.notice
        assert held.path.stat().st_size == lock.RECORD_BYTES
    assert not (run_dir / "lock").exists()


def test_a_file_that_names_nobody_yet_is_given_the_time_to(run_dir, no_flock, monkeypatch):
    monkeypatch.setattr(lock, "SETTLE_S", LONG_S)
    monkeypatch.setattr(Owner, "write", None)
    path = run_dir / "lock"
    path.touch()
    late = threading.Timer(0.1, leave, [run_dir])
    late.start()
    assert "SLURM job 7, process 4711 on n5" in refused(run_dir)
    late.join()


@pytest.mark.parametrize("record", [b"", b"{"])
def test_a_locked_file_that_names_nobody_is_refused(run_dir, monkeypatch, record):
    path = run_dir / "lock"
    path.write_bytes(record)
    with path.open("rb+") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert "in use by an unknown process" in refused(run_dir)
        monkeypatch.setattr(lock, "SETTLE_S", LONG_S)
        late = threading.Timer(0.1, leave, [run_dir])
        late.start()
        assert "in use by SLURM job 7" in refused(run_dir)
        late.join()


def test_only_plain_files_are_locks(run_dir, tmp_path):
    path, other = run_dir / "lock", tmp_path / "precious"
    other.write_text("precious")
    for put in (
        lambda: path.symlink_to(other),
        lambda: path.symlink_to(tmp_path / "missing"),
        path.mkdir,
        lambda: os.mkfifo(path),
    ):
        put()
        with pytest.raises(ConfigError, match=r"lock is in the way: it is not a plain file"):
            run_lock(run_dir).acquire()
        path.rmdir() if path.is_dir() else path.unlink()
    assert other.read_text() == "precious"
    assert not (tmp_path / "missing").exists()


def test_a_run_directory_that_cannot_be_written_to(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"missing/lock cannot be locked: No such file"):
        run_lock(tmp_path / "missing").acquire()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"file/lock cannot be locked: Not a directory"):
        run_lock(tmp_path / "file").acquire()

    def refuse(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ConfigError, match=r"lock cannot be locked: Read-only file system"):
        run_lock(tmp_path).acquire()


def test_a_full_disk_is_a_message_and_no_lock(run_dir, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(ConfigError, match=r"cannot be locked: No space left"):
        run_lock(run_dir).acquire()
    monkeypatch.setattr(os, "pwrite", pwrite)
    assert "an unknown process" in taken_over(run_dir)


def test_a_vanished_run_directory_does_not_end_the_run(run_dir):
    held = run_lock(run_dir, beat_s=0.01)
    with held:
        shutil.rmtree(run_dir)
        time.sleep(0.1)
        assert held._thread.is_alive()
        assert not held.lost
    assert not run_dir.exists()


def test_the_lock_of_another_run_in_a_new_directory_stays(run_dir, hold):
    with run_lock(run_dir, beat_s=0.01) as held:
        shutil.rmtree(run_dir)
        run_dir.mkdir()
        second = hold()
        deadline = time.monotonic() + 30
        while not held.lost and time.monotonic() < deadline:
            time.sleep(0.01)
        assert held.lost
    assert f"process {second.pid}" in refused(run_dir)


def test_who_has_lost_the_lock_is_told_when_it_asks(run_dir):
    with run_lock(run_dir) as held:
        held.check()
        held.path.unlink()
        with run_lock(run_dir):
            pass  # it took over, and has ended
        with pytest.raises(RuntimeError, match="another run has taken over"):
            held.check()


def test_a_requeued_job_waits_until_its_dead_process_lets_go(run_dir, hold, monkeypatch):
    holder = hold({**JOB_7, "SLURM_RESTART_COUNT": "0"})
    again = {**JOB_7, "SLURM_RESTART_COUNT": "1"}
    monkeypatch.setattr(lock, "PATIENCE", 2)
    with pytest.raises(TimeoutError, match=r"is over, but its lock .* is still held"):
        RunLock(run_dir, job_environment(again), watch_s=0.1).acquire()
    waiting = RunLock(run_dir, job_environment(again), watch_s=2.0)
    threading.Timer(1.0, holder.kill).start()
    with waiting:
        assert "that job was requeued" in waiting.notice or "that process has ended" in waiting.notice


def before_first(monkeypatch, holder, name, action):
    """Something that other processes do just before the first call of a function."""
    function = getattr(holder, name)

    def late(*arguments):
        monkeypatch.setattr(holder, name, function)
        action()
        return function(*arguments)

    monkeypatch.setattr(holder, name, late)


def test_a_lock_file_that_goes_before_it_is_opened(run_dir, monkeypatch):
    leave(run_dir)
    before_first(monkeypatch, Path, "is_symlink", (run_dir / "lock").unlink)
    assert taken_over(run_dir) is None


def test_a_lock_file_that_is_replaced_before_it_is_locked(run_dir, monkeypatch):
    leave(run_dir)
    path, judged, judge = run_dir / "lock", [], RunLock._judge

    def replaced():
        path.unlink()
        leave(run_dir, {}, pid=4712)

    before_first(monkeypatch, fcntl, "flock", replaced)
    monkeypatch.setattr(RunLock, "_judge", lambda self, record: judged.append(record) or judge(self, record))
    with run_lock(run_dir) as held:
        assert [Owner.parse(record).pid for record in judged] == [4712]
        assert path.stat().st_ino == os.fstat(held._descriptor).st_ino
        assert f"process {os.getpid()}" in refused(run_dir)


def test_a_lock_that_another_takes_over_first(run_dir, monkeypatch):
    here = {"machine": jobenv.machine_id(), "pid": os.getppid()}
    leave(run_dir, start_ticks=1, **here)
    alive = {"start_ticks": start_ticks(os.getppid()), "host": "n6", **here}
    before_first(monkeypatch, RunLock, "_judge", lambda: leave(run_dir, **alive))
    assert "on n6" in refused(run_dir)
    assert Owner.parse((run_dir / "lock").read_bytes()).host == "n6"


def test_a_lock_that_another_takes_over_at_the_same_moment(run_dir, monkeypatch):
    leave(run_dir, machine=jobenv.machine_id(), pid=os.getppid(), start_ticks=1)
    monkeypatch.setattr(time, "sleep", lambda _: leave(run_dir, host="n6"))
    assert "on n6" in refused(run_dir)


def test_an_owner_that_is_just_letting_go_is_waited_for(run_dir, monkeypatch):
    path = run_dir / "lock"
    leave(run_dir)
    with path.open("rb+") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        before_first(monkeypatch, RunLock, "_read", path.unlink)
        assert taken_over(run_dir) is None


def test_an_owner_that_releases_while_it_is_watched_leaves_the_lock(run_dir, hold, elsewhere):
    first = hold(no_flock=True, boot_id=elsewhere, beat_s=60)
    release = threading.Timer(0.3, first.answer, ["release"])
    release.start()
    with run_lock(run_dir, watch_s=LONG_S) as held:
        assert held.notice is None
    release.join()


def test_of_many_that_take_a_lock_over_at_once_one_gets_it(run_dir, hold):
    leave(run_dir, {})
    for no_flock in (True, False):
        holders = [hold(expect=None, no_flock=no_flock, settle_s=1) for _ in range(3)]
        answers = Counter(holder.answer().partition(":")[0] for holder in holders)
        assert answers == {"held": 1, "ConfigError": 2}
        for holder in holders:
            holder.kill()


RACER = """
import os, sys, time
from pathlib import Path
from fedhpc.job import lock
from fedhpc.errors import ConfigError
from fedhpc.job.environment import job_environment

lock.SETTLE_S = 0.1
inside, taken = Path(sys.argv[1]) / "inside", 0
end = time.monotonic() + 1
while time.monotonic() < end:
    try:
        with lock.RunLock(sys.argv[1], job_environment({})):
            os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
            inside.unlink()
            taken += 1
    except ConfigError:
        pass
print(taken)
"""


def test_no_two_processes_are_ever_inside(run_dir):
    command = [sys.executable, "-c", RACER, str(run_dir)]
    racers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [racer.communicate(timeout=60)[0] for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0, 0]
    assert sum(map(int, outputs)) > 3
    assert list(run_dir.iterdir()) == []


def test_a_forked_child_neither_has_nor_releases_the_lock(run_dir, hold):
    first = hold(fork=True)
    child = int(first.answer())
    try:
        assert f"process {first.pid}" in refused(run_dir)
        first.kill()
        assert start_ticks(child) is not None
        assert "that process has ended" in taken_over(run_dir)
    finally:
        os.kill(child, signal.SIGKILL)


def test_beats_are_whole_records_of_one_size(run_dir, hold):
    hold(JOB_7, beat_s=0.0005)
    path, beats = run_dir / "lock", []
    deadline = time.monotonic() + 30
    while len(set(beats)) < 20 and time.monotonic() < deadline:
        record = path.read_bytes()
        assert len(record) == lock.RECORD_BYTES
        beats.append(Owner.parse(record).beats)
    assert beats == sorted(beats)
    assert len(set(beats)) == 20
