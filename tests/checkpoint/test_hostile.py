"""State files that a stranger made, or that are damaged: one message wherever they are read, soon."""

import os
import shutil
import signal

import h5py
import pytest
import tiny
from hostile import NOT_PLAIN, WRONG

from fedhpc.checkpoint.files import CHECKSUMS_FILE, CONTROL, LOCAL, SEAL, SERVER_FILE, Position, sha256_of
from fedhpc.checkpoint.plain_hdf5 import open_state
from fedhpc.checkpoint.state_file import read_server_file
from fedhpc.checkpoint.store import Checkpoints
from fedhpc.commands import cli
from fedhpc.commands import inspect as inspection
from fedhpc.commands.bounded import bounded
from fedhpc.config.file import load_config
from fedhpc.errors import CheckpointError
from fedhpc.server.job import load_job


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """A run's configuration and its tuning; not to be changed."""
    config = tiny.write_config(world, tmp_path_factory.mktemp("hostile"), "run", federation__rounds=1, trace=False)
    assert cli.main(["run", str(config)]) == 0
    return config, load_job(load_config(config)).tuning


@pytest.fixture
def changed(finished, tmp_path):
    """A server's file with a change of the test's own."""

    def change(how):
        path = shutil.copy(tiny.server_file(finished[0]), tmp_path / SERVER_FILE)
        with h5py.File(path, "a") as file:
            how(file)
        return path

    return change


@pytest.mark.parametrize("change", NOT_PLAIN.values(), ids=NOT_PLAIN)
def test_what_is_not_plain_is_refused_before_anything_is_read(changed, change):
    path = changed(change)
    refused = pytest.raises(CheckpointError, match=f"^{path}: cannot be read as a checkpoint: ")
    with refused, open_state(path.read_bytes(), str(path)):
        pytest.fail("opened")


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_values_that_do_not_fit_the_run_are_refused(changed, finished, change):
    path = changed(change)
    with pytest.raises(CheckpointError, match=f"^{path}: cannot be read as a checkpoint: "):
        read_server_file(path.read_bytes(), str(path), finished[1], dict)


def reseal(folder):
    """As who made the file can do it, too."""
    lines = (folder / CHECKSUMS_FILE).read_text().splitlines()
    names = [line.split("  ")[1] for line in lines]
    text = "".join(f"{sha256_of((folder / name).read_bytes())}  {name}\n" for name in names)
    (folder / CHECKSUMS_FILE).write_text(text)
    (folder / SEAL).write_text(f"{sha256_of(text.encode())}  {CHECKSUMS_FILE}\n")


@pytest.mark.parametrize("name", ["external link", "never written"])
def test_every_command_that_reads_a_strangers_checkpoint_says_so(fedhpc, finished, tmp_path, name):
    run_dir = shutil.copytree(tiny.run_dir(finished[0]), tmp_path / "run")
    folder = Checkpoints(run_dir).path(Position(1))
    with h5py.File(folder / SERVER_FILE, "a") as file:
        NOT_PLAIN[name](file)
    reseal(folder)
    again = ["run", finished[0], "--set", f"run_dir={run_dir}", "--set", "federation.rounds=2"]
    for command in (
        ["inspect", folder / SERVER_FILE],
        again,
        ["predict", run_dir, "--text", "a"],
        ["export", run_dir, "--out", tmp_path / "out"],
    ):
        status, _, err = fedhpc(*command)
        assert status == 2, command
        assert f"{folder / SERVER_FILE}: cannot be read as a checkpoint: " in err
        assert "Traceback" not in err
    status, out, _ = fedhpc("inspect", run_dir)
    assert (status, "NOT VALID" in out) == (2, True)
    assert fedhpc("report", run_dir, "--out", tmp_path / "page.html")[0] == 0


@pytest.mark.parametrize("kind", [CONTROL, LOCAL])
def test_a_devices_file_that_does_not_fit_ends_the_run_with_one_message(fedhpc, finished, tmp_path, kind):
    """It is read once the run has begun; another start would not mend it."""
    run_dir = shutil.copytree(tiny.run_dir(finished[0]), tmp_path / "run")
    for path in (run_dir / "checkpoints" / kind).iterdir():
        with h5py.File(path, "a") as file:
            file.attrs["layers"] = [-1, 0]
    reseal(Checkpoints(run_dir).path(Position(1)))
    with pytest.raises(SystemExit) as ended:
        fedhpc("run", finished[0], "--set", f"run_dir={run_dir}", "--set", "federation.rounds=2")
    assert ended.value.code == 2
    assert (
        "exchanged layers [-1, 0] are not ascending numbers from 0 to 3; ending all ranks"
        in (run_dir / "log.txt").read_text().splitlines()[-1]
    )


def go_round():
    while True:
        pass


@pytest.mark.parametrize(
    ("work", "words"),
    [
        (go_round, "took more than 1 s"),
        (lambda: str(len(bytes(1 << 30))), "takes more than 64 MiB"),
        (lambda: os.kill(os.getpid(), signal.SIGSYS), "crashed the HDF5 library"),
        (signal.pause, "took more than 1 s"),
    ],
)
def test_damage_that_leads_the_library_astray_ends_in_one_message(monkeypatch, work, words):
    """Of thousands of files with random damage some went round in circles, some crashed."""
    monkeypatch.setattr("fedhpc.commands.bounded.WAIT", 1)
    with pytest.raises(CheckpointError, match=f"^x.h5: cannot be read as a checkpoint: .*{words}$"):
        bounded(work, "x.h5", seconds=1, memory=64 << 20)


def test_inspect_reads_within_bounds(fedhpc, finished, monkeypatch):
    monkeypatch.setattr(inspection, "_lines", lambda path: go_round())
    monkeypatch.setattr(inspection, "SECONDS", 1)
    status, _, err = fedhpc("inspect", tiny.server_file(finished[0]))
    assert (status, "it is damaged: reading it took more than 1 s" in err) == (2, True)
