"""What a round of 16 idle devices with 2.6 MB each costs, against as many idle clients in Flower's simulation.

    python benchmarks/flower.py --flower-python .venv-flower/bin/python [--turns 3] [--json FILE]

`benchmarks/round.py` under mpirun and `benchmarks/flower_round.py` in the environment that has `flwr[simulation]` take
turns. Flower has FedAvg, all clients in every round, no evaluation, and an actor for each core. Figures are medians
over the turns of each turn's median; what comes before the third round of a start does not count. Flower looks for new
messages every 0.1 s on both ways, so that its rounds come in about such steps.
"""

import argparse
import ctypes
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests/mpi"))
from launch import command, environment  # noqa: E402

DEVICES = 16
METHODS = ("fedavg", "fedpeptao")
WARM = 2
LIMIT_S = 600
PR_SET_CHILD_SUBREAPER = 36


def run(arguments, variables):
    """Run a program to its end, silent unless it fails."""
    done = subprocess.run(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=variables, timeout=LIMIT_S, check=False
    )
    if done.returncode:
        sys.exit(done.stdout.decode(errors="replace"))


def engine(path):
    """What `round.py` found."""
    run(command(DEVICES + 1, ROOT / "benchmarks/round.py", "--json", path), environment())
    return json.loads(path.read_text())


def flower(python, path, floats):
    """What `flower_round.py` found; nothing of Ray stays, neither processes nor files."""
    with tempfile.TemporaryDirectory() as folder:
        variables = environment() | {"FLWR_HOME": folder, "RAY_TMPDIR": folder, "TMPDIR": folder}
        variables |= {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}
        variables.pop("PYTHONPATH", None)
        arguments = [python, "-P", ROOT / "benchmarks/flower_round.py", "--json", path]
        arguments += ["--clients", DEVICES, "--floats", floats]
        try:
            run([str(each) for each in arguments], variables)
        finally:
            end_children()
    return json.loads(path.read_text())


def end_children():
    """End all that is left below this process, which orphans come to."""
    while children := Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        for pid in map(int, children):
            with suppress(ProcessLookupError, ChildProcessError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flower-python", required=True, help="of an environment with flwr[simulation]")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    turns = {"Flower": [], **{method: [] for method in METHODS}}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figures.json"
        for _ in range(arguments.turns):
            ours = engine(path)
            for method in METHODS:
                turns[method].append(ours["seconds"][method])
            theirs = flower(arguments.flower_python, path, ours["floats"])
            turns["Flower"].append(statistics.median(theirs["seconds"][WARM:]))
    median = {name: statistics.median(found) for name, found in turns.items()}
    ratios = {method: median["Flower"] / median[method] for method in METHODS}
    print(
        f"{DEVICES} devices, {4 * ours['floats'] / 1e6:.1f} MB each, ms a round: "
        + ", ".join(f"{name} {1e3 * each:.1f}" for name, each in median.items())
    )
    print(f"Flower {theirs['version']}: " + ", ".join(f"Flower / {name} {each:.2f}" for name, each in ratios.items()))
    if arguments.json:
        figures = {"seconds": median, "ratios": ratios, "turns": turns, "flower": theirs["version"]}
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
