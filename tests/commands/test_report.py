import io
import json
import logging
import os
from pathlib import Path

import pytest

from fedhpc.evaluate.scores import OF_TOKENS
from fedhpc.job.log import log, log_to_file, start_log
from fedhpc.job.progress import Progress, human_bytes
from fedhpc.job.run_files import RunFiles


def record(round_index, **values):
    return {"round": round_index, "accuracy": None, "loss": 0.5, "bytes": 1000, **values}


def test_a_batch_log_gets_one_plain_line_per_round():
    stream = io.StringIO()
    progress = Progress([], 2, 4, stream)
    progress.update(record(2, accuracy=0.75))
    progress.update(record(3))
    progress.close()
    first, second = stream.getvalue().splitlines()
    assert first.startswith("round 3/4  accuracy 0.750  loss 0.500  moved 1.0 kB  ETA ")
    assert second.startswith("round 4/4  accuracy 0.750  loss 0.500  moved 2.0 kB  ETA 00:00")


def test_progress_after_a_resume_counts_what_was_before():
    stream = io.StringIO()
    Progress([record(0, accuracy=0.25), record(1)], 2, 4, stream).update(record(2))
    assert stream.getvalue().startswith("round 3/4  accuracy 0.250  loss 0.500  moved 3.0 kB  ETA ")


def test_of_texts_the_perplexity_is_shown_and_the_accuracy_is_said_to_be_of_tokens():
    stream = io.StringIO()
    titles = {score.name: score.title for score in OF_TOKENS}
    progress = Progress([record(0, accuracy=0.25, perplexity=9.5)], 1, 3, stream, titles=titles)
    progress.update(record(1))
    progress.update(record(2, accuracy=0.75, perplexity=1e50))
    first, second = stream.getvalue().splitlines()
    assert first.startswith("round 2/3  perplexity 9.500  token accuracy 0.250  loss 0.500")
    assert second.startswith("round 3/3  perplexity 1e+50  token accuracy 0.750  loss 0.500")


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    progress = Progress([], 0, 2, stream)
    progress.update(record(0, accuracy=0.5))
    progress.update(record(1))
    progress.close()
    last = stream.getvalue().split("\r")[-1]
    for word in ("100%", "2/2", "accuracy=0.500", "loss=0.500", "moved=2.0 kB"):
        assert word in last


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2_600_000, "2.6 MB"), (3e12, "3.0 TB")]
)
def test_human_bytes(count, text):
    assert human_bytes(count) == text


FAULTY_CLOCKS = [
    b'"absent": 3',
    b'"devices": 3',
    *(
        b'"seconds": {"step": 1, "server": 1}, "device_steps": [1], ' + rest
        for rest in (
            b'"devices": [0], "device_bytes": [1, 1]',  # no absent ones
            b'"devices": [0], "device_bytes": [1, 1], "absent": null',
            b'"devices": [0], "device_bytes": [1, %s], "absent": []' % (b"9" * 308),
            b'"devices": [[0]], "device_bytes": [1, 1], "absent": []',
            b'"devices": [0, 1], "device_bytes": [1, 1], "absent": []',
        )
    ),
]


@pytest.mark.parametrize(
    "line",
    [
        b'{"round": 1, "accu',
        b"\0\0\xff\n",
        b"[" * 100_000,
        b"[1]\n",
        b"{}\n",
        b'{"round": "x", "accuracy": null, "bytes": 1}\n',
        b'{"round": 1, "accuracy": "high", "bytes": 1}\n',
        b'{"round": 1, "accuracy": null, "bytes": 1, "seconds": 3}\n',
        b'{"round": 1, "accuracy": null, "bytes": 1, "loss": ""}\n',
        b'{"round": 1, "accuracy": null, "bytes": 1e308}\n',
        b'{"round": 1, "accuracy": null, "bytes": 1, "device_accuracy": [{}]}\n',
        *(b'{"round": 1, "accuracy": null, "bytes": 1, %s}\n' % timed for timed in FAULTY_CLOCKS),
    ],
)
def test_what_is_no_line_of_a_round_is_passed_over(tmp_path, line):
    """It may be half a line, of a run under way or of one that a full disk ended."""
    files = RunFiles(tmp_path)
    files.append_metrics(record(0))
    with files.metrics.open("ab") as file:
        file.write(line)
    assert files.read_metrics() == [record(0)]


def test_metrics_that_have_no_end_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    assert RunFiles(tmp_path).read_metrics() == []


def test_metrics_of_an_earlier_run_are_put_aside(tmp_path):
    files = RunFiles(tmp_path)
    assert files.begin_anew() is None
    for number in (1, 2):
        files.append_metrics(record(number))
        assert files.begin_anew() == tmp_path / f"metrics.{number}.jsonl"
        assert files.read_metrics() == []
    assert json.loads((tmp_path / "metrics.1.jsonl").read_text()) == record(1)


def test_metrics_survive_an_interruption(tmp_path):
    files = RunFiles(tmp_path)
    assert files.read_metrics() == []
    files.append_metrics(record(0, loss=1))
    files.append_metrics(record(1, loss=2))
    with files.metrics.open("ab") as file:
        file.write(b'null\n[]\n\0\0\n\xff\n{"round": "2"}\n{"round": 2, "lo')
    files.append_metrics(record(1, loss=3))
    assert files.read_metrics() == [record(0, loss=1), record(1, loss=3)]


def test_records_carry_time_rank_and_host_and_only_rank_0_writes_the_log(tmp_path, capfd):
    path = tmp_path / "log.txt"
    try:
        for rank in (0, 3):
            start_log(rank, 17, "node7")
            log_to_file(path, rank, 17, "node7")
            log.info("hello from %d", rank)
        log.critical("last words")
    finally:
        log.handlers[:] = [logging.NullHandler()]
    errors = capfd.readouterr().err
    assert "INFO rank 0/17 node7: hello from 0" in errors
    assert "INFO rank 3/17 node7: hello from 3" in errors
    written = path.read_text()
    assert "hello from 0" in written
    assert "hello from 3" not in written
    assert "CRITICAL rank 3/17 node7: last words" in written


def test_a_full_disk_is_said_with_the_file_that_it_is_under(tmp_path):
    files = RunFiles(tmp_path)
    files.metrics.symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: '.*metrics\.jsonl'"):
        files.append_metrics({"round": 0})


def test_a_log_that_cannot_be_written_is_said_once_and_ends_nothing(capfd):
    try:
        start_log(0, 1, "node7")
        log_to_file(Path("/dev/full"), 0, 1, "node7")
        log.info("hello")
        log.info("again")
    finally:
        log.handlers[:] = [logging.NullHandler()]
    errors = capfd.readouterr().err
    assert errors.count("/dev/full cannot be written: No space left on device; the run goes on") == 1
    assert "Traceback" not in errors
    assert "again" in errors
