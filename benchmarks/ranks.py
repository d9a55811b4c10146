"""More ranks: what is left of the ideal round time, and how evenly devices of unequal size are placed.

    python benchmarks/ranks.py [--turns 2] [--json FILE]

Rounds: 64 devices of 50 ms, all of them in every round, on 1 to 64 device ranks of this machine; 2.6 MB go down to each
rank and up from each device. Rank counts take turns, figures are medians over all rounds. Makespan: ten devices a round
of 2 to 40 steps on 4 device ranks; what the local part takes against the least it could, and the final parameters
against those of one device rank. Local work is a stand-in that sleeps, the engine is real. The ranks do without
PyTorch, which 65 processes on two cores would take minutes to import.
"""

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np

ROOT = Path(__file__).parents[1]
MODES = ("gather", "reduce")
RATIO = 2 / 3
BATCH = 8

RANKS = (2, 3, 5, 9, 17, 33, 65)
DEVICES, STEPS, STEP_S = 64, 5, 0.01
ROUNDS, WARM = 3, 1

MAKESPAN_RANKS = 5
UNEQUAL, SAMPLED = 20, 10
FEWEST, MOST = 2, 40
QUICKEST_S, SLOWEST_S = 0.015, 0.025
MAKESPAN_ROUNDS, UNMEASURED = 25, 5
"""In the first rounds the server does not know yet how long a device's steps take."""


class LeaveOut(MetaPathFinder, Loader):
    """Imports these packages as nothing at all: a rank without a backbone only names them."""

    packages = ("torch", "transformers")

    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, self, is_package=True) if name.split(".")[0] in self.packages else None

    def create_module(self, spec):
        module = MagicMock(name=spec.name)
        module.nn.Module = type("Module", (), {})  # classes that are made of it are named in annotations
        return module

    def exec_module(self, module):
        pass


def sleeping_updates(step_s):
    """Local updates that sleep so long a step; the result depends on all that a device is given."""
    from fedhpc.checkpoint.device_state import DeviceState
    from fedhpc.device.local_update import DeviceUpdate

    def local_updates(config, backbone, tuning, layers, *, start, assignments, round_index, beat, **_):
        for assignment in assignments:
            device, state = assignment.device, assignment.state
            steps = len(assignment.examples) // BATCH
            for step in range(steps):
                beat(f"device {device} step {step + 1} of {steps}")
                time.sleep(step_s[device])
            shift = state.local[0] / 2 + np.float32(1e-6 * (device + 1) * (round_index + 1))
            yield (
                device,
                DeviceUpdate(
                    params=np.float32(0.99) * start + shift,
                    num_examples=len(assignment.examples),
                    num_steps=steps,
                    loss=1.0,
                    state=DeviceState(local=state.local / 2 + shift / 2, steps_taken=state.steps_taken + steps),
                ),
            )

    return local_updates


def unequal_devices():
    """Steps and seconds a step of each device; with this seed, none is larger than a quarter of its round."""
    rng = np.random.default_rng(1)
    return rng.integers(FEWEST, MOST, UNEQUAL, endpoint=True), rng.uniform(QUICKEST_S, SLOWEST_S, UNEQUAL)


def rank_process(part, folder):
    """One rank of a part's job; rank 0 leaves what it found in the folder."""
    sys.meta_path.insert(0, LeaveOut())
    from fedhpc.exchange import MpiExchange
    from fedhpc.job.log import start_log
    from fedhpc.job.stopping import StopRequest

    start_log(0, 1, "benchmark")
    exchange = MpiExchange(StopRequest())
    found = {"rounds": equal_rounds, "makespan": unequal_rounds, "no work": without_work}[part](exchange, folder)
    if exchange.rank == 0:
        (folder / "found.json").write_text(json.dumps(found))
    exchange.finalize()


def equal_rounds(exchange, folder):
    """What each round of each exchange mode took."""
    from stand_in import make_job, run_job

    from fedhpc.device import training

    training.local_updates = sleeping_updates([STEP_S] * DEVICES)
    found = {}
    for mode in MODES:
        job = make_job(
            folder / mode, ratio=RATIO, rounds=WARM + ROUNDS + 1, num_devices=DEVICES, sampled=DEVICES,
            examples=[STEPS * BATCH] * DEVICES, device={"epochs": 1, "batch_size": BATCH},
            exchange={"mode": mode},
        )  # fmt: skip
        server = run_job(job, exchange)
        if server:
            found[mode] = [round_figures(server, t) for t in range(WARM, WARM + ROUNDS)]
    return found


def round_figures(server, t):
    """A round's seconds and bytes, by what they were spent on."""
    record, seconds = server.records[t], server.began[t + 1] - server.began[t]
    largest, parts = max(server.busy[t]), record["seconds"]
    return {
        "seconds": seconds,
        "largest_local": largest,
        "beside": seconds - largest,
        "broadcast": parts["broadcast"],
        "wait": parts["local"] - largest,
        "gather": parts["gather"],
        "server": parts["server"],
        "moved": int(np.count_nonzero(np.subtract(server.homes[t], server.homes[t - 1]))),
        "cpu": server.cpu[t + 1] - server.cpu[t],
        "bytes_down": record["bytes_down"],
        "bytes_up": record["bytes_up"],
    }


def unequal_rounds(exchange, folder, work=True):
    """Local seconds of each round, what they could be, and the digest of the final parameters."""
    from stand_in import make_job, run_job

    from fedhpc.device import training

    steps, step_s = unequal_devices()
    training.local_updates = sleeping_updates(step_s * work)
    job = make_job(
        folder / "run", ratio=RATIO, rounds=MAKESPAN_ROUNDS, num_devices=UNEQUAL, sampled=SAMPLED,
        examples=(BATCH * steps).tolist(), device={"epochs": 1, "batch_size": BATCH},
    )  # fmt: skip
    server = run_job(job, exchange)
    if server is None:
        return None
    assert not any(record["rejected"] for record in server.records)
    rounds = []
    for record, busy, homes in zip(server.records, server.busy, server.homes, strict=True):
        work_s = (steps * step_s)[record["devices"]]
        placed = np.bincount(np.array(homes)[record["devices"]], work_s)
        share = work_s.sum() / exchange.num_workers
        rounds.append(
            {
                "local": record["seconds"]["local"],
                "busiest": max(busy),
                "placed": placed.max(),
                "share": share,
                "bound": max(share, work_s.max()),
                "best": best_makespan(work_s, exchange.num_workers) if work else None,
            }
        )
    digest = hashlib.sha256(server.state.server.params.tobytes()).hexdigest()
    return {"rounds": rounds[UNMEASURED:], "sha256": digest}


def without_work(exchange, folder):
    """The same, but no device takes any time."""
    return unequal_rounds(exchange, folder, work=False)


def best_makespan(work_s, num_workers):
    """The least that the busiest worker can have to do, by trying every placement but those that are mirror images."""
    loads = np.zeros((1, num_workers))
    for seconds in sorted(work_s, reverse=True):
        loads = np.concatenate([loads + seconds * (np.arange(num_workers) == worker) for worker in range(num_workers)])
        loads = np.unique(np.sort(loads, axis=1), axis=0)
    return float(loads.max(axis=1).min())


def started(part, num_ranks, folder):
    """What a part's rank 0 found."""
    from launch import command, environment

    folder.mkdir()
    arguments = command(num_ranks, __file__, "--as-rank", part, folder)
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment(), check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads((folder / "found.json").read_text())


def measure_rounds(folder, turns):
    """For each mode and number of ranks: medians over the rounds of all turns."""
    found = {(mode, num_ranks): [] for mode in MODES for num_ranks in RANKS}
    for turn in range(turns):
        for num_ranks in RANKS:
            for mode, rounds in started("rounds", num_ranks, folder / f"{num_ranks}ranks{turn}").items():
                found[mode, num_ranks] += rounds
    rows = []
    for (mode, num_ranks), rounds in found.items():
        ideal = DEVICES * STEPS * STEP_S / (num_ranks - 1)
        medians = {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
        rows.append({"mode": mode, "ranks": num_ranks, "ideal": ideal, **medians})
    return rows


def print_rounds(rows):
    print(f"{DEVICES} devices of {1e3 * STEPS * STEP_S:.0f} ms a round; seconds a round:")
    print(
        "mode    ranks  ideal  round / ideal beside local: broadcast   wait gather server moved  CPU rank 0  MB down/up"
    )
    for row in rows:
        print(
            f"{row['mode']:7s} {row['ranks']:5d} {row['ideal']:6.2f} {row['seconds']:6.2f} "
            f"{row['seconds'] / row['ideal']:7.2f} {row['beside']:13.3f} {row['broadcast']:9.3f} {row['wait']:6.3f} "
            f"{row['gather']:6.3f} {row['server']:6.3f} {row['moved']:5.1f} {row['cpu']:11.2f} "
            f"{row['bytes_down'] / 1e6:7.1f}/{row['bytes_up'] / 1e6:.1f}"
        )


def measure_makespan(folder):
    """The local part of rounds against a quarter of their work, and against the best placement."""
    four = started("makespan", MAKESPAN_RANKS, folder / "makespan")
    one = started("no work", 2, folder / "one")
    rounds = four["rounds"]
    even = [each for each in rounds if each["bound"] == each["share"]]

    def median_and_max(name, over, among):
        ratios = [each[name] / each[over] for each in among]
        return {"median": statistics.median(ratios), "max": max(ratios), "rounds": len(ratios)}

    return {
        "local / quarter": median_and_max("local", "share", even),
        "local / bound": median_and_max("local", "bound", rounds),
        "  busiest rank as measured / bound": median_and_max("busiest", "bound", rounds),
        "  busiest rank by nominal work / bound": median_and_max("placed", "bound", rounds),
        "  the same of the best placement / bound": median_and_max("best", "bound", rounds),
        "seconds": statistics.median(each["local"] for each in rounds),
        "sha256": [four["sha256"], one["sha256"]],
    }


def print_makespan(found):
    print(
        f"{SAMPLED} devices of {FEWEST} to {MOST} steps on {MAKESPAN_RANKS - 1} device ranks: local part "
        f"{found['seconds']:.2f} s; bound: a quarter of the work, or the largest device"
    )
    for name, ratio in found.items():
        if isinstance(ratio, dict):
            print(f"  {name}: median {ratio['median']:.3f}, max {ratio['max']:.3f} of {ratio['rounds']} rounds")
    four, one = found["sha256"]
    print(f"  final parameters sha256 {four[:16]}, with one device rank {one[:16]}")
    if four != one:
        sys.exit("the final parameters depend on the number of ranks")


def main():
    if sys.argv[1:2] == ["--as-rank"]:
        return rank_process(sys.argv[2], Path(sys.argv[3]))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    sys.path.append(str(ROOT / "tests/mpi"))
    with tempfile.TemporaryDirectory() as name:
        rounds = measure_rounds(Path(name), arguments.turns)
        print_rounds(rounds)
        makespan = measure_makespan(Path(name))
    if arguments.json:
        arguments.json.write_text(json.dumps({"rounds": rounds, "makespan": makespan}, indent=2) + "\n")
    print_makespan(makespan)
    return 0


if __name__ == "__main__":
    sys.exit(main())
