"""How a command speaks and ends: whoever reads it, in any encoding, whatever is wrong with the files it is given."""

import errno
import json
import os
import shutil
import subprocess
import sys

import pytest
from tiny import metrics, run_dir, write_config

from fedhpc.commands.cli import main
from fedhpc.data.prepared import PreparedData
from fedhpc.errors import ConfigError
from fedhpc.job.console import run_command, show

ODD = 'é "好" \\ 😀 \udcff'


@pytest.fixture
def streams(monkeypatch, tmp_path):
    """Put files in the place of standard output and error; what was written to them."""

    def put(encoding="utf-8", out=None):
        files = [
            out or (tmp_path / "out").open("w", encoding=encoding),
            (tmp_path / "err").open("w", encoding=encoding),
        ]
        monkeypatch.setattr(sys, "stdout", files[0])
        monkeypatch.setattr(sys, "stderr", files[1])
        return lambda name: (tmp_path / name).read_text(encoding=encoding)

    return put


def without_reader():
    reading, writing = os.pipe()
    os.close(reading)
    return os.fdopen(writing, "w")


@pytest.mark.parametrize("encoding", ["ascii", "iso-8859-1", "utf-8"])
def test_words_that_the_encoding_does_not_have_are_escaped_and_json_stays_json(streams, encoding):
    written = streams(encoding)
    assert run_command(lambda: show(json.dumps({"text": ODD}, ensure_ascii=False)) or 0) == 0
    assert json.loads(written("out")) == {"text": ODD}
    if encoding != "ascii":
        assert "é" in written("out")


def refuse():
    raise ConfigError(ODD)


def test_a_message_in_any_encoding(streams):
    written = streams("ascii")
    assert run_command(refuse, "fedhpc: ") == 2
    assert written("err") == 'fedhpc: error: \\u00e9 "\\u597d" \\ \\ud83d\\ude00 \\udcff\n'


def test_a_result_that_nobody_reads_ends_quietly_and_one_without_room_with_a_message(streams):
    written = streams(out=without_reader())
    assert run_command(lambda: show("x" * 100_000) or 0) == 1
    assert written("err") == ""
    with open("/dev/full", "w") as full:
        written = streams(out=full)
        assert run_command(lambda: show("x") or 0) == 2
    assert written("err") == "error: standard output: No space left on device\n"


def test_a_slow_reader_of_a_pipe_that_does_not_wait_gets_everything(streams, tmp_path):
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with subprocess.Popen("sleep 0.2; wc -c", shell=True, stdin=reading, stdout=subprocess.PIPE) as reader:
        os.close(reading)
        with os.fdopen(writing, "w") as out:
            streams(out=out)
            assert run_command(lambda: show("x" * 1_000_000) or 0) == 0
        assert reader.communicate()[0].split() == [b"1000001"]


WITHOUT_OUTPUT = """
import sys
from fedhpc.job.console import run_command

def command():
    with open(sys.argv[1], "w") as file:  # gets the lowest number that is free
        print("word", flush=True)
        file.write("data")
    return 0

sys.exit(run_command(command))
"""


def test_words_for_a_closed_stream_go_into_no_other_file(tmp_path):
    script, file = tmp_path / "script.py", tmp_path / "file"
    script.write_text(WITHOUT_OUTPUT)
    subprocess.run(["sh", "-c", '"$@" >&- 2>&-', "sh", sys.executable, script, file], check=True)
    assert file.read_text() == "data"


def test_an_interrupt_by_hand_ends_as_shells_expect():
    def interrupted():
        raise KeyboardInterrupt

    assert run_command(interrupted) == 130


def test_a_stream_that_is_closed_takes_everything(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert run_command(refuse) == 2
    assert sys.stdout is None


def test_a_run_outlives_the_readers_of_its_words(run_config):
    """Its exit status too, which Python makes 120 where a stream cannot be written at the end."""
    config = run_config(federation__rounds=3)
    command = [sys.executable, "-m", "fedhpc", "run", config]
    with without_reader() as pipe, open("/dev/full", "w") as full:
        assert subprocess.run(command, stdout=pipe, stderr=full, timeout=120, check=False).returncode == 0
    assert len(metrics(config)) == 3
    words = (run_dir(config) / "log.txt").read_text()
    assert words.count("standard output cannot be written: Broken pipe; the run goes on") == 1
    assert words.count("standard error cannot be written: No space left on device; the run goes on") == 1
    assert "done after round 3" in words


COMMANDS = {
    "run": ["{}/config.yaml"],
    "plan": ["{}/config.yaml", "--ranks", "3"],
    "predict": ["{}/run", "--file", "{}/texts.txt", "--out", "{}/out/predictions"],
    "export": ["{}/run", "--out", "{}/out/adapter"],
    "inspect": ["{}/run"],
    "report": ["{}/run", "--out", "{}/out/page.html"],
    "sweep": ["{}/experiment.yaml"],
    "prepare": ["--task", "{}/task.yaml", "--source", "{}/source", "--model", "{}/model", "--out", "{}/out/prepared"],
    "partition": ["--data", "{}/data", "--table", "{}/out/table"],
}
CLOSED = {
    "run": ["config.yaml", "base.yaml", "data", "data/train.slots.npy", "model", "run", "run/metrics.jsonl"],
    "plan": ["data", "run/log.txt", "run/checkpoints/control"],
    "predict": ["run", "run/checkpoints", "run/checkpoints/round_000001/server.h5", "texts.txt", "out"],
    "export": ["run", "data/description.json", "out"],
    "inspect": ["run", "run/metrics.jsonl"],
    "report": ["run", "run/config.yaml", "out"],
    "sweep": ["experiment.yaml", "base.yaml", "out"],
    "prepare": ["task.yaml", "source", "source/train.tsv", "model", "out"],
    "partition": ["data", "data/train.labels.npy", "out"],
}
"""Command -> files and folders that it cannot do without."""


@pytest.fixture(scope="module")
def folder(world, tmp_path_factory):
    """Everything that a command may be given: data, model, a run, and where to write."""
    folder = tmp_path_factory.mktemp("given")
    for theirs, ours in (("prepared", "data"), ("backbone", "model"), ("source", "source")):
        shutil.copytree(world.parent / theirs, folder / ours)
    (folder / "source/task.yaml").rename(folder / "task.yaml")
    (folder / "out").mkdir()
    given = {"model__name": str(folder / "model"), "data__path": str(folder / "data")}
    write_config(world, folder, "run", federation__rounds=1, **given).rename(folder / "base.yaml")
    (folder / "config.yaml").write_text("base: base.yaml\n")
    (folder / "experiment.yaml").write_text(f"base: base.yaml\nout: {folder}/out/sweep\ngrid: {{seed: [1]}}\n")
    (folder / "texts.txt").write_text("the place\n")
    assert call("run", folder) == 0
    return folder


def call(command, folder):
    return main([command, *(argument.format(folder) for argument in COMMANDS[command])])


@pytest.mark.parametrize(("command", "name"), [(command, name) for command in CLOSED for name in CLOSED[command]])
def test_a_file_of_another_user_is_named_in_one_message(folder, unprivileged, capfd, command, name):
    path = folder / name
    mode = path.stat().st_mode
    path.chmod(0)
    try:
        status = call(command, folder)
    finally:
        path.chmod(mode)
    out, err = capfd.readouterr()
    assert (status, out) == (2, "")
    (message,) = err.splitlines()
    assert "error: " in message
    assert str(path) in message
    assert "Permission denied" in message


@pytest.mark.parametrize("hindrance", ["a loop", "a long name"])
def test_a_name_that_leads_nowhere_is_refused(folder, fedhpc, tmp_path, hindrance):
    path = tmp_path / "name"
    if hindrance == "a loop":
        path.symlink_to(path)
    else:
        path = tmp_path / ("x" * 256)
    run = ["run", folder / "config.yaml", "--set"]
    for arguments in (
        ["run", path],
        *([*run, f"{key}={path}"] for key in ("run_dir", "data.path", "model.name")),
        ["predict", path, "--text", "a"],
        ["predict", folder / "run", "--text", "a", "--out", path / "out"],
        ["export", folder / "run", "--out", path],
        ["inspect", path],
        ["report", path, "--out", tmp_path / "page.html"],
        ["report", folder / "run", "--out", path / "page.html"],
        ["sweep", folder / "experiment.yaml", "--out", path],
    ):
        status, _, err = fedhpc(*arguments)
        assert status == 2
        assert str(path) in err


def test_a_fault_of_the_machine_is_worth_another_start(folder, fedhpc, monkeypatch):
    def fail(path, *, verify):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr(PreparedData, "open", fail)
    with pytest.raises(SystemExit) as ended:
        fedhpc("run", folder / "config.yaml")
    assert ended.value.code == 1
    with pytest.raises(OSError, match="Input/output error"):
        fedhpc("plan", folder / "config.yaml", "--ranks", "3")


@pytest.mark.parametrize("name", ["a link", "a pipe"])
def test_what_is_no_plain_file_is_written_to_and_not_replaced(folder, fedhpc, tmp_path, name):
    path, read = tmp_path / "page.html", tmp_path / "read"
    if name == "a link":
        path.symlink_to(read)
    else:
        os.mkfifo(path)
        reader = subprocess.Popen(["cp", path, read])
    assert fedhpc("report", folder / "run", "--out", path)[0] == 0
    if name == "a pipe":
        assert reader.wait(60) == 0
        assert path.is_fifo()
    assert read.read_text().startswith("<!doctype html>")
    assert path.is_symlink() == (name == "a link")
