"""Parts of somebody else's package: named under `plugins:` or found as installed, same bits on any ranks and behind any
interruption; their source is a part of the run's identity."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from launch import MPIRUN, command, environment
from tiny import ROOT, final_tensors, metrics, run_dir, write_config, write_world

pytestmark = pytest.mark.skipif(MPIRUN is None, reason="no mpirun beside this Python or on PATH")

PACKAGE = ROOT / "tests/plugin"
PARTS = {
    "server": {"method": "median", "share": 0.9},
    "tuning": {"kind": "scaling", "strength": 0.5},
    "federation": {"num_devices": 6, "sample_rate": 0.5, "rounds": 3, "partition": "sorted"},
    "trackers": [{"kind": "csv", "file": "seen.csv"}],
}
STOP_AT_STEP = 8  # of six in a round


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plugins")
    shutil.copytree(PACKAGE / "acme_federated", folder / "acme_federated")
    path = write_world(folder, num_train=60, num_validation=12)
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | PARTS | {"plugins": ["acme_federated"]}))
    return path


def start(folder, *arguments, ranks=1, paths=()):
    """`python *arguments` in a folder, where plug-ins are looked for; the completed process."""
    words = [sys.executable, *map(str, arguments)] if ranks == 1 else command(ranks, *arguments)
    environ = {**environment(), "PYTHONPATH": os.pathsep.join(map(str, (ROOT, *paths)))}
    return subprocess.run(words, capture_output=True, text=True, timeout=300, cwd=folder, env=environ, check=False)


def run(config, **how):
    return start(config.parent, "-m", "fedhpc", "run", config, **how)


@pytest.fixture(scope="module")
def on_three_ranks(world):
    config = write_config(world, world.parent, "three")
    done = run(config, ranks=3)
    assert done.returncode == 0, done.stderr[-2000:]
    return config


def test_a_run_with_parts_from_outside(on_three_ranks):
    assert [record["round"] for record in metrics(on_three_ranks)] == [0, 1, 2]
    lines = (run_dir(on_three_ranks) / "seen.csv").read_text().splitlines()
    assert lines[0] == "round,loss of median"
    assert [float(line.split(",")[1]) for line in lines[1:]] == [record["loss"] for record in metrics(on_three_ranks)]
    resolved = yaml.safe_load((run_dir(on_three_ranks) / "config.yaml").read_text())
    assert resolved["server"] == {"method": "median", "weights": "examples", "max_rejected": 0.2, "share": 0.9}
    assert resolved["tuning"]["strength"] == 0.5


def test_ranks_and_interruptions_leave_no_trace(world, on_three_ranks):
    alone = write_config(world, world.parent, "alone")
    stopped = start(alone.parent, ROOT / "tests/mpi/run_each.py", "--stop", STOP_AT_STEP, alone, paths=[ROOT / "tests"])
    assert stopped.returncode == 0, stopped.stderr[-2000:]
    assert len(metrics(alone)) < 3
    assert run(alone).returncode == 0
    assert final_tensors(alone) == final_tensors(on_three_ranks)
    seen = [run_dir(config).joinpath("seen.csv").read_text() for config in (alone, on_three_ranks)]
    assert seen[0] == seen[1]


def test_another_source_is_refused(world, on_three_ranks):
    file = world.parent / "acme_federated/median.py"
    text = file.read_text()
    try:
        file.write_text(text.replace("np.median(", "np.mean("))
        done = run(on_three_ranks)
    finally:
        file.write_text(text)
    assert done.returncode == 2
    assert "source of acme_federated" in done.stderr
    assert run(on_three_ranks).returncode == 0


def test_an_installed_package_is_found(world, on_three_ranks, tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "package")
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    subprocess.run([sys.executable, *install, "--target", tmp_path / "site", tmp_path / "package"], check=True)
    (tmp_path / "empty").mkdir()
    config = write_config(world, tmp_path / "empty", "installed", plugins=[])
    done = run(config, paths=[tmp_path / "site"])
    assert done.returncode == 0, done.stderr[-2000:]
    assert final_tensors(config) == final_tensors(on_three_ranks)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (None, ("plugins: mine cannot be imported", "No module named 'mine'", "looked for in")),
        ("1 / 0", ("plugins: mine cannot be imported: ZeroDivisionError", "mine.py, line 1)")),
        (
            "import fedhpc\n@fedhpc.register_method('fedavg')\nclass Mine(fedhpc.methods.FedAvg): pass\n",
            ("server method 'fedavg' is registered twice", "fedhpc.methods.fedavg.FedAvg and mine.Mine"),
        ),
    ],
)
def test_a_plugin_that_cannot_be_used(world, tmp_path, source, words):
    if source is not None:
        (tmp_path / "mine.py").write_text(source)
    done = run(write_config(world, tmp_path, "refused", plugins=["mine"]))
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    for text in words:
        assert text in done.stderr
    assert not Path(tmp_path / "refused").exists()


def test_an_unknown_part_names_those_that_there_are(world):
    done = start(world.parent, "-m", "fedhpc", "run", world, "--set", "server.method=medain", "--set", "trackers=[]")
    assert done.returncode == 2
    assert "server.method: should be" in done.stderr
    assert "'median'" in done.stderr
