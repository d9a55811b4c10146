"""fedhpc watch: what it says of a run's folder, whatever is in there."""

import io
import json
import os
import re
import signal
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import yaml
from tiny import run_dir

from fedhpc.commands import watch
from fedhpc.commands.watch import health as judging
from fedhpc.commands.watch.files import Files
from fedhpc.commands.watch.health import look
from fedhpc.commands.watch.screen import Screen, plain
from fedhpc.commands.watch.words import RED, Line, span
from fedhpc.config import Config
from fedhpc.errors import EXIT_STOPPED, EXIT_USER_ERROR
from fedhpc.exchange import LocalExchange
from fedhpc.exchange.control_channel import ControlChannel
from fedhpc.job.environment import job_environment
from fedhpc.job.lock import Owner
from fedhpc.job.status import RankStatus, Status
from fedhpc.job.stopping import StopRequest
from fedhpc.server import status_file
from fedhpc.server.status_file import StatusFile

LOG = """\
2026-11-29 22:10:02,118 INFO rank 0/4 n1: this is process 17, SLURM job 811
2026-11-29 22:10:03,118 WARNING rank 0/4 n1: device.reset_moments has no effect
2026-11-29 22:10:03,120 INFO rank 0/4 n1: starting at round 0 of 20: 100 devices, 10 a round, 4 ranks; exchanging
2026-11-29 23:09:04,512 INFO rank 0/4 n1: stopped on request (SIGUSR1 at rank 2 (n2)), 5.0 MB written; 0.2 s since
2026-11-29 23:20:00,000 INFO rank 0/4 n1: this is process 18, SLURM job 811
"""
WENT_ON = "2026-11-29 23:20:01,000 INFO rank 0/4 n1: resuming within round 2 of 20: 100 devices, 10 a round, 4 ranks\n"
FAILED = "2026-11-29 23:21:01,000 CRITICAL rank 3/4 n2: OSError: no answer; ending all ranks\nTraceback (most\n"
RANKS = [
    RankStatus(rank=0, host="n1", doing="asking all ranks to train, round 3", for_s=70, silent_s=0.1),
    RankStatus(rank=1, host="n1", doing="waiting for the server", for_s=12, silent_s=2),
    RankStatus(rank=2, host="n2", doing="waiting for the server", for_s=40, silent_s=3),
    RankStatus(rank=3, host="n2", doing="training in round 3: device 7 step 4 of 9", for_s=61, silent_s=20),
]


def record(index, **more):
    return {
        "round": index,
        "devices": [1, 2, 3],
        "absent": [{"device": 2, "reason": "late (3 s)"}],
        "loss": 0.5,
        "accuracy": 0.75,
        "accuracy_global": 0.5,
        "bytes": 1000,
        "seconds": {"round": 3000.0},
        **more,
    }


def owner(**changes):
    """A lock file's content: this process's, unless changed."""
    return json.dumps(vars(Owner.this_process(job_environment({}))) | changes).encode()


def status(**changes):
    values = {
        "written": "2026-11-30T12:00:00+01:00",
        "process": os.getpid(),
        "up_s": 5000.0,
        "stop": "",
        "stops_in_s": 10830.0,
        "ranks": RANKS,
    }
    return Status(**values | changes).packed()


def age(path, seconds):
    """Have a file be so old."""
    os.utime(path, (time.time() - seconds,) * 2)


@pytest.fixture
def make_run(tmp_path):
    """A run directory: files by name, each as text or bytes."""

    def make(name="run", log=LOG + WENT_ON, records=3, rounds=20, **files):
        folder = tmp_path / name
        (folder / "checkpoints/round_000002").mkdir(parents=True)
        (folder / "checkpoints/round_000002/COMPLETE").touch()
        (folder / "log.txt").write_text(log)
        (folder / "config.yaml").write_text(yaml.safe_dump({"federation": {"rounds": rounds}}))
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record(i)) + "\n" for i in range(records)))
        for file, content in files.items():
            (folder / file.replace("_", ".")).write_bytes(content)
        age(folder / "checkpoints/round_000002/COMPLETE", 5 * 3600 + 20)
        age(folder / "metrics.jsonl", 4000)  # the round under way is to end at any moment
        return folder

    return make


def test_a_run_under_way(fedhpc, make_run):
    folder = make_run(lock=owner(title="SLURM job 811"), status_json=status())
    code, out, err = fedhpc("watch", folder)
    assert (code, err) == (0, "")
    for words in (
        f"running: {folder}\n",
        "3 of 20, 50 min each, 13 h 20 min to go",
        "round 3, loss 0.5; devices: 1 late",
        "accuracy 0.7500, global 0.5000, after round 3",
        "3.0 kB, 1.0 kB a round",
        "round_000002, 5 h old",
        f"SLURM job 811, process {os.getpid()} on",
        "alive",
        "it stops itself in 3 h, before it is done",
        "2 waiting, 1 late",
        "3  n2  training in round 3: device 7 step 4 of 9, 1 min 1 s; LATE: others wait; no word for 20 s",
        "2026-11-29 22:10:02  SLURM job 811 on n1, 4 rank(s), starting at round 0 of 20",
        "2026-11-29 23:09:04    stopped: SIGUSR1 at rank 2 (n2)",
        "resuming within round 2 of 20",
        "WARNING rank 0: device.reset_moments has no effect",
    ):
        assert words in out, words
    assert out.index("training in round 3") < out.index("asking all ranks")
    assert "\x1b" not in out


def test_json_has_the_same(fedhpc, make_run):
    code, out, _ = fedhpc("watch", make_run(lock=owner(), status_json=status(stop="SIGTERM")), "--json")
    found = json.loads(out)
    assert code == 0
    assert (found["state"], found["why"], found["rounds_done"], found["rounds"]) == ("running", "SIGTERM", 3, 20)
    assert [rank["late"] for rank in found["ranks"]] == [False, False, False, True]
    assert [rank["silent"] for rank in found["ranks"]] == [False, False, False, True]
    assert found["seconds_to_go"] == 16 * 3000
    assert found["stops_first"]
    assert [start["end"] for start in found["history"]["starts"]] == ["stopped", None]
    assert found["scores"] == {"accuracy": 0.75, "accuracy_global": 0.5}
    assert found["bytes"] == 3000


def test_nobody_is_late_while_most_are_at_work():
    ranks = [RankStatus(rank=i, host="n", doing="training", for_s=99, silent_s=0) for i in range(5)]
    waiting = RankStatus(rank=5, host="n", doing="waiting for the server", for_s=50, silent_s=0)
    assert not any(rank.late for rank in judging._judged([*ranks, waiting]))


@pytest.mark.parametrize(
    ("state", "words", "log", "records", "lock"),
    [
        ("stopped", "goes on when it is started again", LOG.rpartition("2026")[0], 3, None),
        ("failed", "rank 3: OSError: no answer", LOG + WENT_ON + FAILED, 3, None),
        ("failed", "not alive any more", LOG + WENT_ON + FAILED, 3, {"start_ticks": 1}),
        ("lost", "ended without a word", LOG + WENT_ON, 3, {"start_ticks": 1}),
        ("lost", "ended without a word", LOG, 3, None),
        ("done", "20 of 20", LOG + WENT_ON, 20, None),
        ("not begun", "0 of 20", "", 0, None),
        ("running", "heard of", LOG + WENT_ON, 3, {"machine": "another"}),
    ],
)
def test_states(make_run, fedhpc, state, words, log, records, lock):
    folder = make_run(log=log, records=records, **({"lock": owner(**lock)} if lock else {}))
    found = look(folder, Files())
    assert found.state == state
    assert words in fedhpc("watch", folder)[1]
    assert found.ranks == []  # nobody has said what they do
    assert found.is_over == (state in ("done", "failed"))


def test_a_run_that_was_lost_still_shows_where_its_ranks_were(make_run):
    folder = make_run(lock=owner(start_ticks=1), status_json=status())
    found = look(folder, Files())
    assert (found.state, len(found.ranks)) == ("lost", 4)
    (folder / "lock").write_bytes(owner(pid=1))  # somebody goes on, and has not begun to say what
    found = look(folder, Files())
    assert (found.stops_in_s, found.ranks) == (None, [])


def test_no_sign_of_life(make_run, fedhpc):
    folder = make_run(lock=owner(machine="another"), status_json=status())
    for name, seconds in (("lock", 50), ("status.json", 41)):
        age(folder / name, seconds)
    assert re.search(r"no sign of life for 4\d s", fedhpc("watch", folder)[1])
    age(folder / "status.json", -3600)  # a file server whose clock is ahead
    assert look(folder, Files()).state == "running"


def test_a_change_that_was_seen_counts_instead_of_clocks(make_run):
    folder, files = make_run(lock=owner(machine="another")), Files()
    age(folder / "lock", 4000)
    assert look(folder, files).state == "silent"
    age(folder / "lock", 3990)  # it beats, by a clock that is an hour behind
    assert look(folder, files).state == "running"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "metrics.jsonl",
            json.dumps(record(0)).encode() + b'\n{"round": 1, "accu',
            "metrics.jsonl: 1 line(s), cut short or damaged",
        ),
        ("status.json", status()[:100], "status.json: cut short or damaged"),
        ("status.json", b"[" * 10**5, "status.json: cut short or damaged"),
        ("status.json", status().replace(b"5000.0", b"9" * 400), "status.json: cut short or damaged"),
        ("status.json", status().replace(b'"n1"', b"null"), "status.json: cut short or damaged"),
        ("config.yaml", b"federation: [", "config.yaml: cannot be read"),
        ("config.yaml", b"federation: {rounds: many}", "federation.rounds: 'many' is no number of rounds"),
        ("config.yaml", b"federation: {rounds: " + b"9" * 400 + b"}", "is no number of rounds"),
        ("lock", b"\0" * 50, "lock        of a process that cannot be told"),
        ("log.txt", bytes(range(256)) * 9, "3 of 20"),
    ],
    ids=range(10),
)
def test_what_is_damaged_is_left_out_with_a_word(make_run, fedhpc, name, content, words):
    folder = make_run(lock=owner(), status_json=status())
    (folder / name).write_bytes(content)
    for option in ("--once", "--json"):
        code, out, err = fedhpc("watch", folder, option)
        assert (code, err) == (0, "")
    assert words in fedhpc("watch", folder)[1]
    assert json.loads(out)["run_dir"] == str(folder)


def test_a_file_that_cannot_be_read_is_left_out(make_run, fedhpc, unprivileged):
    folder = make_run()
    (folder / "metrics.jsonl").chmod(0)
    (folder / "status.json").mkdir()
    out = fedhpc("watch", folder)[1]
    assert "metrics.jsonl: Permission denied" in out
    assert "status.json: is not a plain file" in out


@pytest.mark.parametrize("name", ["nowhere", "empty", "file", "closed"])
def test_a_folder_of_no_run_is_refused(fedhpc, tmp_path, unprivileged, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "closed").mkdir(mode=0)
    code, out, err = fedhpc("watch", tmp_path / name)
    assert (code, out) == (EXIT_USER_ERROR, "")
    assert err.startswith(f"fedhpc: error: {tmp_path / name}: ")
    assert err.count("\n") == 1


def test_a_sweep_has_a_line_for_each_cell(fedhpc, make_run, tmp_path):
    make_run("seed=1", log="", records=20)
    make_run("seed=2", lock=owner(), status_json=status())
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/seed=0.5.log").write_text("=== run\nfedhpc: error: x\n=== exit status 2\n")
    code, out, _ = fedhpc("watch", tmp_path)
    assert code == 0
    head, *lines = out.splitlines()
    assert head == "3 cells: 1 failed, 1 running, 1 done"
    assert [line.split() for line in lines] == [
        ["failed", "0/?", "seed=0.5"],
        ["running", "3/20", "accuracy", "0.7500", "13", "h", "20", "min", "to", "go", "1", "late", "seed=2"],
        ["done", "20/20", "accuracy", "0.7500", "seed=1"],
    ]
    assert not watch._is_over(tmp_path, [("a", SimpleNamespace(is_over=False))])
    assert watch._is_over(tmp_path, [("a", SimpleNamespace(is_over=True))])
    (tmp_path / "lock").touch()  # the sweep is between two cells
    assert not watch._is_over(tmp_path, [("a", SimpleNamespace(is_over=True))])
    cells = json.loads(fedhpc("watch", tmp_path, "--json")[1])["cells"]
    assert (cells[0]["name"], cells[0]["state"]) == ("seed=0.5", "failed")


class TestTerminal:
    def test_the_view_is_renewed_until_the_run_is_done(self, make_run, fedhpc, monkeypatch):
        folder = make_run(lock=owner())

        def sleep(seconds):
            assert seconds == 0.5
            (folder / "lock").unlink()
            (folder / "log.txt").write_text(LOG + "2026-11-30 01:00:00,000 INFO rank 0/4 n1: done after round 20; x\n")

        monkeypatch.setattr(watch, "is_live", lambda: True)
        monkeypatch.setattr(watch.time, "sleep", sleep)
        monkeypatch.delenv("NO_COLOR", raising=False)
        code, out, _ = fedhpc("watch", folder, "--every", "0.5")
        first, _, second = out.partition("A\x1b[J")
        assert code == 0
        assert "running: " in first
        assert "done: " in second
        assert first.rpartition("\x1b[")[2] == str(first.count("\n"))  # up by the lines that stand there
        assert "\x1b[32m" in first

    def test_narrow_and_low(self, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "20")
        monkeypatch.setenv("LINES", "4")
        monkeypatch.setenv("NO_COLOR", "1")
        Screen(live=True).show([Line("漢" * 30, RED), *[Line(f"line {i}") for i in range(9)]])
        assert capsys.readouterr().out.splitlines() == ["漢" * 9, "line 0", "... and 8 more line"]

    def test_a_file_cannot_command_the_terminal(self, monkeypatch):
        assert plain("a\x1b[2Jb\nc") == "a\\x1b[2Jb\\nc"
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
        assert plain("é") == "\\u00e9"


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (65, "1 min 5 s"), (7200, "2 h"), (90061, "1 d 1 h"), (18005, "5 h")]
)
def test_spans(seconds, words):
    assert span(seconds) == words


class TestStatusFile:
    def test_a_run_is_watched_while_it_runs_and_after_a_stop(self, fedhpc, run_config, monkeypatch):
        config, seen, beat = run_config(selection__strategy="last"), [], LocalExchange.beat
        monkeypatch.setattr(status_file, "EVERY_S", 0.01)

        def watched_beat(exchange, activity):
            beat(exchange, activity)
            if activity.startswith("training in round 1"):
                until = time.monotonic() + 5
                while not seen or (seen[-1].ranks[0].doing != activity and time.monotonic() < until):
                    seen.append(look(run_dir(config), Files()))
                    time.sleep(0.01)
                os.kill(os.getpid(), signal.SIGUSR1)

        monkeypatch.setattr(LocalExchange, "beat", watched_beat)
        assert fedhpc("run", config)[0] == EXIT_STOPPED
        during, after = seen[-1], look(run_dir(config), Files())
        assert (during.state, during.rounds_done, during.rounds) == ("running", 1, 3)
        assert during.holder.alive
        assert during.ranks[0].doing.startswith("training in round 1: device ")
        assert (after.state, after.why, after.rounds_done) == ("stopped", "SIGUSR1", 1)
        assert after.checkpoint.name.startswith("round_000001_part_")
        (start,) = after.history.starts
        assert (start.job, start.how, start.end) == ("no batch job", "starting at round 0 of 3", "stopped")
        assert not (run_dir(config) / "status.json").exists()
        assert not after.left_out

    def test_under_privacy_no_device_is_named(self, tmp_path):
        said = ["training in round 1: device 7 step 1 of 2, device 9 step 1 of 2", "scoring layers on device 3"]
        exchange = SimpleNamespace(
            heard=lambda: [RankStatus(rank=i, host="n", doing=doing, silent_s=0) for i, doing in enumerate(said)],
            stop=StopRequest(),
        )
        config = SimpleNamespace(run_dir=tmp_path, privacy=SimpleNamespace(is_on=True))
        told = StatusFile(config, exchange, None).status()
        assert [rank.doing for rank in told.ranks] == ["training in round 1", "scoring layers on a device"]
        config.privacy.is_on = False
        assert [rank.doing for rank in StatusFile(config, exchange, None).status().ranks] == said

    def test_a_hanging_file_system_does_not_keep_a_run(self, tmp_path, monkeypatch):
        go_on = threading.Event()
        monkeypatch.setattr(status_file, "write_whole", lambda *_, **__: go_on.wait())
        monkeypatch.setattr(status_file, "LAST_S", 0.05)
        exchange, lock = LocalExchange(StopRequest()), SimpleNamespace(lost=False)
        start = time.monotonic()
        with StatusFile(Config.model_construct(run_dir=str(tmp_path)), exchange, lock):
            pass
        assert time.monotonic() - start < 2
        go_on.set()

    def test_what_the_server_has_heard(self):
        communicator = SimpleNamespace(rank=0, size=3)
        ignore = lambda _: None  # noqa: E731
        channel = ControlChannel(None, communicator, ["a", "b", "c"], StopRequest(), deliver=ignore, ring=ignore)
        channel._activities[2], channel._silence[2] = "evaluating", 7.0
        heard = channel.heard()
        assert [(rank.rank, rank.host, rank.doing) for rank in heard] == [
            (0, "a", "setting up"),
            (1, "b", "starting"),
            (2, "c", "evaluating"),
        ]
        assert heard[2].silent_s == 7.0
