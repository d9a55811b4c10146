"""Every device is evaluated on with its own layers, on whichever worker it lives."""

from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from queue import Queue
from threading import Lock

import numpy as np
import torch
from tiny import NUM_DEVICES

from fedhpc.checkpoint.device_state import DeviceState
from fedhpc.config.file import load_config
from fedhpc.device.evaluation import Evaluation
from fedhpc.device.round_context import RoundContext
from fedhpc.evaluate.predictions import class_scores
from fedhpc.federation.sampling import Homes
from fedhpc.model.backbone import Backbone
from fedhpc.server.job import load_job
from fedhpc.tuning.base import as_parameters

NUM_WORKERS = 3
LAYERS = (0, 2)
STATELESS = 4
"""A device that was sampled but never had a state."""


class Mail:
    """A worker's end of an exchange between threads, one of which has its turn at a time."""

    def __init__(self, worker, queues, turn):
        self.worker, self.queues, self.turn, self.num_taken = worker, queues, turn, 0

    def beat(self, activity):
        pass

    def move_states(self, outgoing, incoming):
        for worker, data in outgoing:
            self.queues[self.worker, worker].put(data)
        self.num_taken += len(incoming)
        self.turn.release()
        received = [self.queues[worker, self.worker].get(timeout=20) for worker in incoming]
        self.turn.acquire()
        return received


def test_each_device_is_evaluated_on_with_its_own_layers(run_config):
    config = run_config(federation={"num_devices": NUM_DEVICES, "sample_rate": 1.0}, evaluate={"batch_size": 7})
    job = load_job(load_config(config))
    backbone = Backbone(job.config.model, job.config.tuning, job.data.description, torch.device("cpu"))
    params, unseen = job.tuning.split(job.tuning.initial(0), LAYERS)
    rng = np.random.default_rng(0)
    own = {device: rng.standard_normal(unseen.size, np.float32) for device in range(NUM_DEVICES)}
    own[STATELESS] = unseen
    homes, queues, turn = Homes(NUM_DEVICES, NUM_WORKERS), defaultdict(Queue), Lock()
    mail = [Mail(worker, queues, turn) for worker in range(NUM_WORKERS)]

    def record_of(worker):
        evaluation = Evaluation(job.config, job.data, job.partition, backbone, job.tuning, mail[worker])
        here = {d: DeviceState(local=own[d]) for d in homes.devices_of(worker) if d != STATELESS}
        context = RoundContext(round=1, layers=LAYERS, params=params)
        with turn:
            return evaluation.record(context, DeviceState(local=unseen), here, homes, worker)

    with ThreadPoolExecutor(NUM_WORKERS) as threads:
        records = list(threads.map(record_of, range(NUM_WORKERS)))
    assert sum(end.num_taken for end in mail) > 0

    split, right = job.data.split("validation"), []
    for device, examples in enumerate(job.partition.validation):
        tensors = as_parameters(job.tuning.merge(params, own[device], LAYERS), torch.device("cpu"))
        scored = class_scores(backbone, job.tuning, split, [[(tensors, np.array([i]))] for i in examples])
        right.append(sum(int(scores.argmax()) == split.labels[i] for (i,), scores in scored))
    total = {name: sum(record[name][0] for record in records) for name in records[0].dtype.names}
    assert total["correct"].tolist() == right
    assert total["evaluated"].tolist() == [len(examples) for examples in job.partition.validation]
    assert total["personal"].sum() == total["global"].sum() == len(split)
    assert not np.array_equal(total["personal"], total["global"])
