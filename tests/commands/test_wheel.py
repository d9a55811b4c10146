"""The wheel has all that the commands need."""

import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from try_wheel import build, tour

MPIRUN = Path(sys.executable).parent / "mpirun"
WORDS = {"bad": "terrible", "good": "great", "mixed": "okay"}


@pytest.mark.skipif(not MPIRUN.exists(), reason="no mpirun beside this Python")
def test_a_wheel_without_the_checkout(world, tmp_path):
    """With this environment's packages, from an empty folder."""
    wheel = build(sys.executable, tmp_path, "--no-build-isolation")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", tmp_path / "site", wheel]
    subprocess.run(pip, check=True)
    source = tiny.write_source(tmp_path / "source", num_train=60)
    for split in ("train", "dev"):
        lines = (source / f"{split}.tsv").read_text().splitlines()
        said = [f"{text}\t{WORDS[label]}" for text, label in (line.split("\t") for line in lines[1:])]
        (source / f"{split}.tsv").write_text("\n".join([lines[0], *said]) + "\n")
    (tmp_path / "here").mkdir()
    backbone, bin_dir = world.parent / "backbone", tmp_path / "site/bin"
    said = tour(tmp_path / "here", bin_dir, MPIRUN, source, backbone, PYTHONPATH=str(tmp_path / "site"))
    assert "decoder, verbalizer head" in said["init"]
    assert str(tmp_path / "site/fedhpc/job/templates/sweep.slurm") in said["sweep"]
    for name in ("py.typed", "commands/report/page.js"):
        assert (tmp_path / "site/fedhpc" / name).is_file()
