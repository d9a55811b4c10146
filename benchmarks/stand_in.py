"""A job of RoBERTa large's shape whose devices do no work, for benchmarks of what is around the local steps."""

import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from fedhpc.config import Config, section_of
from fedhpc.data.prepared import Split
from fedhpc.device.worker import Worker, serve
from fedhpc.federation.partition import Partition
from fedhpc.job.environment import job_environment
from fedhpc.job.lock import RunLock
from fedhpc.model.pretrained import BackboneShape
from fedhpc.registry import TUNINGS
from fedhpc.server.server import Server
from fedhpc.tuning import make_tuning

EXAMPLES = 64


class TimedServer(Server):
    """Notes when each round begins and what came of it; neither evaluates nor writes checkpoints."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.began, self.cpu, self.busy, self.homes, self.records = [], [], [], [], []
        self.saving.save = lambda state, **named: state
        devices, placement = self.devices, self.devices.placement
        measured, collect = placement.measured, devices.collect

        def noting_measured(device, seconds, steps):
            self.busy[-1][placement.homes[device]] += seconds
            measured(device, seconds, steps)

        def noting_collect(state, this):
            self.began.append(time.perf_counter())
            self.cpu.append(time.process_time())
            self.busy.append([0.0] * self.num_workers)
            uploads, record = collect(state, this)
            self.homes.append([placement.homes[device] for device in range(self.config.federation.num_devices)])
            return uploads, record

        placement.measured, devices.collect = noting_measured, noting_collect

    def update(self, state, uploads, record):
        state = super().update(state, uploads, record)
        self.records.append(record)
        return state

    def evaluate(self, state, seconds):
        return {"accuracy": 0.0, "accuracy_global": 0.0}


def run_job(job, exchange):
    """All rounds; the server on rank 0, None on the others."""
    if exchange.rank:
        serve(exchange, Worker(job.config, job.data, job.partition, None, job.tuning, exchange))
        return None
    Path(job.config.run_dir).mkdir(parents=True)
    with RunLock(job.config.run_dir, job_environment()) as lock:
        server = TimedServer(job, exchange, lock)
        server.run(None)
    return server


def make_job(run_dir, *, ratio=1.0, rounds=1, num_devices=100, sampled=10, examples=None, **sections):
    """A job without data and backbone, which exchanges the first layers; so many examples on each device."""
    selection = {"strategy": "all"} if ratio == 1 else {"strategy": "first", "ratio": ratio}
    config = Config.model_validate(
        {
            "run_dir": str(run_dir),
            "model": {"name": "stand-in"},
            "data": {"path": "stand-in"},
            "federation": {"num_devices": num_devices, "sample_rate": sampled / num_devices, "rounds": rounds},
            "selection": selection,
            **sections,
        }
    )
    shape = BackboneShape(
        name="stand-in",
        num_layers=24,
        num_heads=16,
        num_key_value_heads=16,
        head_dim=64,
        hidden_size=1024,
        embedding_width=1024,
        output_width=1024,
        initializer_range=0.02,
        max_positions=512,
    )
    tuning = make_tuning(section_of(TUNINGS, num_tokens=20), shape, num_classes=2)
    facts = {"task": "stand-in", "head": "verbalizer", "max_length": 128, "metric": "accuracy"}
    description = SimpleNamespace(**facts, class_names=["no", "yes"])
    none = Split(tokens=np.empty(0), offsets=np.zeros(1), labels=np.empty(0), slots=np.empty(0), pad_id=0)
    data = SimpleNamespace(description=description, split=lambda name: none)
    train = [np.arange(count) for count in examples or [EXAMPLES] * num_devices]
    partition = Partition(train, [np.arange(1)] * num_devices)
    identity = {**config.identity(), "sha256": config.sha256}
    return SimpleNamespace(
        config=config,
        data=data,
        shape=shape,
        tuning=tuning,
        partition=partition,
        identity=identity,
        privacy=None,
    )
