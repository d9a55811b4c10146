"""What a round costs besides local work, evaluation and checkpoints, against a bare broadcast and gather.

    mpirun -np 17 python benchmarks/round.py [--json FILE]

All devices are sampled, one on each device rank; 2.6 MB go down to and up from each. The local work is nothing at all.
Blocks of the engine's rounds and of raw mpi4py `Bcast` and `Gatherv` of the same bytes take turns; figures are medians
over all rounds. So do blocks of `fedavg` with each way to exchange, whose bytes and time stand side by side: what a
device sends, what crosses ranks, a round's time, and how much longer that is than with `gather`. At the end one device
works for ten seconds, and the CPU time of a rank that waits for it is measured.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from stand_in import EXAMPLES, make_job, run_job

from fedhpc.device import training
from fedhpc.device.local_update import DeviceUpdate
from fedhpc.exchange import MpiExchange
from fedhpc.job.log import start_log
from fedhpc.job.stopping import StopRequest

RATIO = 2 / 3
BLOCKS, ROUNDS, WARM = 5, 12, 2
WAIT_S = 10.0
WAYS = {
    "gather": {},
    "reduce": {"mode": "reduce"},
    "secure": {"mode": "secure"},
    "topk": {"encoding": "topk"},
    "16 bits": {"dtype": "bfloat16"},
}
"""Sections `exchange`."""


class StandIn:
    """Local updates that are ready before they are asked for."""

    def __init__(self):
        self.update = None
        self.work_s = 0.0

    def __call__(self, config, backbone, tuning, layers, *, start, assignments, beat, **_):
        (assignment,) = assignments
        if self.update is None:
            params = np.empty_like(start) if assignment.out is None else assignment.out
            np.add(start, np.float32(1e-4 * (assignment.device + 1)), out=params)
            self.update = DeviceUpdate(
                params=params, num_examples=EXAMPLES, num_steps=16, loss=1.0, state=assignment.state
            )
        until = time.monotonic() + self.work_s
        while time.monotonic() < until:
            beat(f"device {assignment.device} step 1 of 1")
            time.sleep(0.05)
        yield assignment.device, self.update


def engine_rounds(exchange, stand_in, folder, *, rounds, method="fedavg", way="gather", ratio=RATIO):
    """Seconds of each round and its metrics, on rank 0."""
    workers = exchange.num_workers
    job = make_job(
        folder, ratio=ratio, rounds=rounds, num_devices=workers, sampled=workers, server={"method": method},
        evaluate={"every": rounds}, exchange=WAYS[way],
    )  # fmt: skip
    stand_in.update = None
    server = run_job(job, exchange)
    if server is None:
        return [], []
    shutil.rmtree(folder)
    return np.diff(server.began)[WARM:].tolist(), server.records[WARM:-1]


def raw_rounds(comm, size, size_up, rounds):
    """Seconds of each broadcast and gather of so many floats, on rank 0."""
    down, mine = np.ones(size, np.float32), np.ones(size_up if comm.rank else 0, np.float32)
    up = np.ones((comm.size - 1, size_up), np.float32) if comm.rank == 0 else None
    counts = [0] + [size_up] * (comm.size - 1)
    seconds = []
    for _ in range(rounds):
        comm.Barrier()
        began = time.perf_counter()
        comm.Bcast(down, root=0)
        comm.Gatherv(mine, [up, counts] if comm.rank == 0 else None, root=0)
        seconds.append(time.perf_counter() - began)
    return seconds[WARM:]


def waiting_cpu(exchange, stand_in, folder):
    """CPU seconds that a rank, not the one with work, spends in a round that takes ten seconds."""
    if exchange.rank == exchange.size - 1:
        stand_in.work_s = WAIT_S
    began = time.process_time()
    engine_rounds(exchange, stand_in, folder, rounds=1)
    return time.process_time() - began


def print_ways(by_way):
    """Side by side what each way to exchange sends and takes."""
    rows = {}
    for way, (seconds, records) in by_way.items():
        record = records[-1]
        rows[way] = {
            "device_bytes": record["device_bytes"],
            "bytes_down": record["bytes_down"],
            "bytes_up": record["bytes_up"],
            "seconds": statistics.median(seconds),
        }
    print("fedavg      a device sends  ranks down      up  ms a round  beside gather")
    for way, row in rows.items():
        more = 1e3 * (row["seconds"] - rows["gather"]["seconds"])
        print(
            f"{way:10s} {row['device_bytes'][1] / 1e6:12.2f} MB {row['bytes_down'] / 1e6:8.1f} MB "
            f"{row['bytes_up'] / 1e6:5.1f} MB {1e3 * row['seconds']:8.1f} {more:+10.1f}"
        )
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=BLOCKS, help="turns of each")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    start_log(0, 1, "benchmark")
    training.local_updates = stand_in = StandIn()
    exchange = MpiExchange(StopRequest())
    comm = exchange._mpi.COMM_WORLD
    folder = Path(comm.bcast(tempfile.mkdtemp() if exchange.rank == 0 else None))
    size = make_job(folder, ratio=RATIO).tuning.exchanged(range(int(RATIO * 24))).size
    times = {"raw": [], "fedavg": [], "fedpeptao": []}
    parts = {"fedavg": [], "fedpeptao": []}
    by_way = {way: ([], []) for way in WAYS}
    for block in range(arguments.blocks):
        times["raw"] += raw_rounds(comm, size, size, ROUNDS)
        for method in ("fedavg", "fedpeptao"):
            seconds, found = engine_rounds(
                exchange, stand_in, folder / f"{method}{block}", rounds=ROUNDS, method=method
            )
            times[method] += seconds
            parts[method] += [record["seconds"] for record in found]
        for number, way in enumerate(WAYS):
            place = folder / f"way{number}_{block}"
            seconds, found = engine_rounds(exchange, stand_in, place, rounds=ROUNDS, way=way)
            by_way[way][0].extend(seconds)
            by_way[way][1].extend(found)
    cpu = comm.gather(waiting_cpu(exchange, stand_in, folder / "waiting"))
    if exchange.rank == 0:
        median = {name: statistics.median(found) for name, found in times.items()}
        print(
            f"{exchange.num_workers} devices, {4 * size / 1e6:.1f} MB each, ms a round: "
            + ", ".join(f"{name} {1e3 * each:.1f}" for name, each in median.items())
        )
        print(", ".join(f"{name} / raw {median[name] / median['raw']:.2f}" for name in ("fedavg", "fedpeptao")))
        by_part = {
            method: {name: statistics.median(record[name] for record in found) for name in found[0]}
            for method, found in parts.items()
        }
        for method, found in by_part.items():
            print(f"  of {method}: " + ", ".join(f"{name} {1e3 * each:.1f}" for name, each in found.items()))
        print(
            f"CPU seconds of ranks that wait {WAIT_S:.0f} s: server {cpu[0]:.2f}, "
            f"device ranks at most {max(cpu[1:-1]):.2f}"
        )
        ways = print_ways(by_way)
        figures = {"ways": ways, "seconds": median, "floats": size, "parts": by_part, "waiting_cpu_s": cpu}
        if arguments.json:
            arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
        shutil.rmtree(folder)
    exchange.finalize()


if __name__ == "__main__":
    main()
