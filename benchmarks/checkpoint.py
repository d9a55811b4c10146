"""What checkpoints cost, at the size of RoBERTa large's prompts: 24 layers, 20 tokens, width 1024, 100 devices.

    mpirun -np 11 python benchmarks/checkpoint.py --out runs/bench-checkpoint [--json FILE]

The engine is real, the local work a stand-in of one second a device. Blocks of rounds with a checkpoint after each take
turns with blocks without; the first two rounds of a block are not counted: there the block before's writing ends, or
its devices are written too.
Rank 0 then measures the rate at which the engine writes against plain HDF5, and the memory of a server that has seen
10,000 devices (their files are links to one file, which the engine never changes in place).
"""

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
from stand_in import EXAMPLES, make_job

from fedhpc.checkpoint.device_state import DeviceState
from fedhpc.checkpoint.files import CONTROL, verify
from fedhpc.checkpoint.state_file import RunState, control_file
from fedhpc.checkpoint.store import Checkpoints
from fedhpc.device import training
from fedhpc.device.local_update import DeviceUpdate
from fedhpc.device.worker import Worker, serve
from fedhpc.exchange import LocalExchange, MpiExchange
from fedhpc.exchange.messages import NO_RECORD, Note, NoteKind
from fedhpc.federation import sampling as federation
from fedhpc.files import fsync
from fedhpc.job.environment import job_environment
from fedhpc.job.lock import RunLock
from fedhpc.job.log import start_log
from fedhpc.job.stopping import StopRequest
from fedhpc.methods import Population, make_method
from fedhpc.methods.updates import RoundUploads
from fedhpc.server import server as server_module
from fedhpc.server.saving import CheckpointWriter
from fedhpc.server.server import Server

NUM_DEVICES, SAMPLED, LOCAL_WORK_S = 100, 10, 1.0
BLOCK, BLOCKS = 6, 6
SEEN = 10_000
STEPS = 10


def stand_in_updates(config, backbone, tuning, layers, *, start, assignments, beat, **_):
    """One second of nothing, and parameters that differ."""
    (assignment,) = assignments
    state = assignment.state
    for step in range(STEPS):
        beat(f"step {step}")
        time.sleep(LOCAL_WORK_S / STEPS)
    yield (
        assignment.device,
        DeviceUpdate(
            params=start + np.float32(1e-4 * (assignment.device + 1)),
            num_examples=EXAMPLES,
            num_steps=STEPS,
            loss=1.0,
            state=DeviceState(local=state.local + np.float32(1e-4), steps_taken=state.steps_taken + STEPS),
        ),
    )


def one_device_for_each_rank(config, round_index):
    """Ten devices of ten ranks: every round has the same work."""
    return [(SAMPLED * round_index + place) % NUM_DEVICES for place in range(SAMPLED)]


class TimedServer(Server):
    """Notes when each round's local work begins; takes checkpoints in every second block only."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.began, self.begun, self.committed = [], {}, {}
        save, commit = self.saving.save, self.checkpoints.commit

        def save_in_turns(state, **named):
            if not self.in_block_with(state.server.round):
                return state
            self.begun[state.server.round] = time.perf_counter()
            return save(state, **named)

        def timed_commit(position, *arguments, **named):
            commit(position, *arguments, **named)
            self.committed[position.round] = time.perf_counter()

        collect = self.devices.collect

        def noting_collect(state, this):
            self.began.append(time.perf_counter())
            return collect(state, this)

        self.saving.save, self.checkpoints.commit = save_in_turns, timed_commit
        self.devices.collect = noting_collect

    @staticmethod
    def in_block_with(done):
        return (done - 1) // BLOCK % 2 == 1

    def evaluate(self, state, seconds):
        return {"accuracy": 0.0, "accuracy_global": 0.0}


def measure_overhead(exchange, folder, ratio):
    """Median seconds of a round with and without a checkpoint; what was written."""
    rounds = 2 * BLOCK * (BLOCKS // 2) + 1
    job = make_job(folder / f"ratio{ratio}", ratio=ratio, rounds=rounds)
    if exchange.rank:
        worker = Worker(job.config, job.data, job.partition, None, job.tuning, exchange)
        serve(exchange, worker)
        return None
    Path(job.config.run_dir).mkdir(parents=True)
    with RunLock(job.config.run_dir, job_environment()) as lock:
        server = TimedServer(job, exchange, lock)
        server.run(None)
    seconds = np.diff(server.began)
    counted = [t for t in range(len(seconds)) if t % BLOCK >= 2]
    with_one = [seconds[t] for t in counted if TimedServer.in_block_with(t + 1)]
    without = [seconds[t] for t in counted if not TimedServer.in_block_with(t + 1)]
    latency = [server.committed[t] - server.begun[t] for t in server.committed]
    checkpoints = Checkpoints(job.config.run_dir)
    newest = checkpoints.path(checkpoints.positions()[0])
    began = time.perf_counter()
    verify(newest)
    verified = time.perf_counter() - began
    on_disk = sum(path.stat().st_size for path in checkpoints.folder.rglob("*.h5"))
    result = {
        "ratio": ratio,
        "rounds": [len(with_one), len(without)],
        "round_s_with": statistics.median(with_one),
        "round_s_without": statistics.median(without),
        "overhead": statistics.median(with_one) / statistics.median(without) - 1,
        "begin_to_commit_s": statistics.median(latency),
        "server_bytes_per_checkpoint": server.saving.bytes_written / len(server.committed),
        "verify_s": verified,
        "bytes_on_disk": on_disk,
    }
    shutil.rmtree(job.config.run_dir)
    return result


def measure_write_rate(folder):
    """Seconds for ten control variates by the engine and by plain h5py with fsync, in turns; the ratio."""
    job = make_job(folder)
    vector = np.random.default_rng(0).standard_normal(job.tuning.exchanged(range(24)).size).astype(np.float32)
    layers = tuple(range(24))
    checkpoints = Checkpoints(folder / "rate")
    checkpoints.begin()
    engine, plain = [], []
    for repeat in range(8):
        began = time.perf_counter()
        for device in range(SAMPLED):
            data = control_file(vector, 1, layers, job.tuning)
            checkpoints.write_device_file(CONTROL, device, repeat, data)
        fsync(checkpoints.folder / CONTROL)
        engine.append(time.perf_counter() - began)
        began = time.perf_counter()
        for device in range(SAMPLED):
            path = checkpoints.folder / f"plain_{repeat}_{device}.h5"
            with h5py.File(path, "w") as file:
                file["control"] = vector
            fsync(path)
        fsync(checkpoints.folder)
        plain.append(time.perf_counter() - began)
    nbytes = SAMPLED * vector.nbytes
    shutil.rmtree(checkpoints.folder)
    return {
        "engine_MB_s": nbytes / statistics.median(engine) / 1e6,
        "plain_MB_s": nbytes / statistics.median(plain) / 1e6,
        "engine_over_plain": statistics.median(engine) / statistics.median(plain),
    }


def measure_server(folder, seen):
    """Peak memory and seconds of a checkpoint of a server with so many devices seen; ten take part in a round.

    To be called in a process of its own, whose peak it is.
    """
    job = make_job(folder / f"seen{seen}")
    layers = tuple(range(24))
    exchange = LocalExchange(StopRequest())

    def handler(command):
        exchange.post(Note(kind=NoteKind.ALL_SAVED))
        return NO_RECORD.zeros(0)

    exchange.handler = handler
    checkpoints = Checkpoints(job.config.run_dir)
    checkpoints.begin()
    size = job.tuning.exchanged(layers).size
    data = control_file(np.ones(size, np.float32), 0, layers, job.tuning)
    name, sha256 = checkpoints.write_device_file(CONTROL, 0, 0, data)
    first = checkpoints.partial / name
    sums = {name: sha256}
    for device in range(1, seen):
        name = f"../{CONTROL}/{device:06d}_000000.h5"
        os.link(first, checkpoints.partial / name)
        sums[name] = sha256
    writer = CheckpointWriter(job, exchange, checkpoints, SimpleNamespace(check=lambda: None))
    writer.control.note_files(sums)
    writer._device_files = sums
    method = make_method(job.config.server, Population(num_devices=seen, sample_rate=SAMPLED / seen, total_count=seen))
    params, local = job.tuning.split(job.tuning.initial(1), layers)
    state = RunState(server=method.init(params), layers=layers, unseen_local=local)
    rng, seconds, steps = np.random.default_rng(1), [], []
    for _ in range(6):
        devices = rng.choice(seen, SAMPLED, replace=False)
        writer.control.prefetch(devices.tolist(), layers)
        uploads = RoundUploads(
            device_ids=devices,
            num_examples=np.full(SAMPLED, EXAMPLES),
            counts=np.full(SAMPLED, EXAMPLES),
            num_steps=np.full(SAMPLED, STEPS),
            params=np.stack([state.server.params + np.float32(1e-4)] * SAMPLED),
            device_learning_rate=5e-3,
        )
        control = writer.control.fetched()
        began = time.perf_counter()
        server = method.update(replace(state.server, control=control), uploads)
        steps.append((time.perf_counter() - began) / SAMPLED)
        writer.control.update({device: server.control[device] for device in devices.tolist()})
        state = replace(state, server=replace(server, control={}))
        began = time.perf_counter()
        state = writer.save(state)
        writer.wait()
        seconds.append(time.perf_counter() - began)
    peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
    shutil.rmtree(checkpoints.folder)
    return {
        "seen": seen,
        "peak_MiB": peak / 2**20,
        "checkpoint_s": statistics.median(seconds),
        "step_ms_a_device": 1e3 * statistics.median(steps),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="a folder for the runs, emptied at the end")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    training.local_updates = stand_in_updates
    federation.sample_devices = server_module.sample_devices = one_device_for_each_rank
    start_log(0, 1, "benchmark")
    exchange = MpiExchange(StopRequest())
    if exchange.size != SAMPLED + 1:
        parser.error(f"start it on {SAMPLED + 1} ranks: mpirun -np {SAMPLED + 1}")
    overhead = [measure_overhead(exchange, arguments.out, ratio) for ratio in (1, 0.5)]
    if exchange.rank:
        exchange.finalize()
        return
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        servers = [pool.apply(measure_server, (arguments.out, seen)) for seen in (NUM_DEVICES, SEEN)]
    figures = {"overhead": overhead, "write_rate": measure_write_rate(arguments.out), "server": servers}
    for found in overhead:
        print(
            f"ratio {found['ratio']}: a round takes {found['round_s_with']:.3f} s with a checkpoint, "
            f"{found['round_s_without']:.3f} s without: {found['overhead']:+.1%}; "
            f"{found['server_bytes_per_checkpoint'] / 1e6:.0f} MB each, on disk after "
            f"{found['begin_to_commit_s']:.2f} s; verified again in {found['verify_s']:.2f} s"
        )
    rate = figures["write_rate"]
    print(
        f"write rate: engine {rate['engine_MB_s']:.0f} MB/s, plain HDF5 {rate['plain_MB_s']:.0f} MB/s, "
        f"time ratio {rate['engine_over_plain']:.2f}"
    )
    for found in servers:
        print(
            f"server, {found['seen']} devices seen: peak {found['peak_MiB']:.0f} MiB, checkpoint "
            f"{found['checkpoint_s']:.2f} s, server step {found['step_ms_a_device']:.2f} ms a sampled device"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    shutil.rmtree(arguments.out, ignore_errors=True)
    exchange.finalize()


if __name__ == "__main__":
    main()
