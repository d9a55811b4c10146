"""The devices' side: a worker holds the devices that live on its rank and answers the server's commands."""

import time
from dataclasses import replace
from itertools import islice

import numpy as np

from fedhpc import messages
from fedhpc.checkpoint import Checkpoints
from fedhpc.config import Config
from fedhpc.data import PreparedData
from fedhpc.evaluate import evaluate, evaluation_batches
from fedhpc.exchange import MpiExchange
from fedhpc.federation import devices_of, sample_devices
from fedhpc.local_update import DeviceState, local_update
from fedhpc.messages import Command, Op
from fedhpc.models import Backbone
from fedhpc.partition import Partition
from fedhpc.seeding import generator
from fedhpc.selection import layer_score
from fedhpc.spectrum import lossless_ratio
from fedhpc.tuning import Tuning


def serve(exchange: MpiExchange, worker: "Worker") -> None:
    """Receive, update the local devices, reply, until the server says stop."""
    while (command := exchange.receive()).op != Op.STOP:
        exchange.reply(worker.handle(command))


class Worker:
    """The devices of one rank."""

    def __init__(
        self,
        config: Config,
        data: PreparedData,
        partition: Partition,
        backbone: Backbone,
        tuning: Tuning,
        *,
        index: int,
        num_workers: int,
    ) -> None:
        self.config = config
        self.train, self.validation = data.split("train"), data.split("validation")
        self.num_classes = len(data.description.class_names)
        self.partition = partition
        self.backbone = backbone
        self.tuning = tuning
        self.index, self.num_workers = index, num_workers
        self.checkpoints = Checkpoints(config.run_dir)
        self.devices = devices_of(index, config.federation.num_devices, num_workers)
        self.states: dict[int, DeviceState] = {}
        self.unseen = DeviceState(local=np.empty(0, np.float32))
        """The state of a device before its first round."""

    def handle(self, command: Command) -> np.ndarray:
        """Do what the server asks; the records to reply with."""
        if command.op == Op.STOP:
            return messages.NO_RECORD.zeros(0)
        actions = {
            Op.SCORE: self.score,
            Op.SELECT: self.select,
            Op.RESTORE: self.restore,
            Op.TRAIN: self.train_devices,
            Op.RATIO: self.ratio,
            Op.EVALUATE: self.evaluate,
            Op.SAVE: self.save,
        }
        return actions[command.op](command)

    def train_devices(self, command: Command) -> np.ndarray:
        """Local updates of the sampled devices that live here."""
        devices = self._sampled(command.round)
        records = messages.upload_record(command.payload.size).zeros(len(devices))
        headers, params = messages.upload_parts(records)
        for header, vector, device in zip(headers, params, devices, strict=True):
            start = time.perf_counter()
            update = local_update(
                self.config,
                self.backbone,
                self.tuning,
                command.layers,
                start=command.payload,
                state=self.states.get(device, self.unseen),
                split=self.train,
                examples=self.partition.train[device],
                round_index=command.round,
                device=device,
            )
            self.states[device] = update.state
            vector[:] = update.params
            header["device"], header["loss"] = device, update.loss
            header["num_examples"], header["num_steps"] = update.num_examples, update.num_steps
            header["seconds"] = time.perf_counter() - start
        return records

    def score(self, command: Command) -> np.ndarray:
        """Layer scores of every device here, on one batch each."""
        selection = self.config.selection
        records = messages.score_record(self.tuning.shape.num_layers).zeros(len(self.devices))
        self.backbone.training_mode(False)
        for record, device in zip(records, self.devices, strict=True):
            examples = self._one_batch(device, "score batch", selection.batch_size)
            outputs = self.backbone.layer_outputs(self.train.batch(examples).to(self.backbone.torch_device))
            scores = [layer_score(output.float().cpu().numpy(), selection.distance) for output in outputs]
            record["device"], record["num_examples"] = device, len(self.partition.train[device])
            record["scores"] = scores
        return records

    def ratio(self, command: Command) -> np.ndarray:
        """Lossless ratio of the sampled devices that live here, from the Hessian's spectrum on one batch each."""
        devices = self._sampled(command.round)
        records = messages.ratio_record().zeros(len(devices))
        self.backbone.training_mode(False)
        for record, device in zip(records, devices, strict=True):
            examples = self._one_batch(device, "hessian batch", self.config.device.batch_size)
            tensors = self.tuning.merge(command.payload, self.unseen.local, command.layers)
            rng = generator(self.config.seed, purpose="hessian", round_index=command.round, device=device)
            batch = self.train.batch(examples).to(self.backbone.torch_device)
            record["device"], record["num_examples"] = device, len(self.partition.train[device])
            record["ratio"] = lossless_ratio(
                self.backbone, self.tuning, tensors, batch, by=self.config.selection.auto_by, rng=rng
            )
        return records

    def select(self, command: Command) -> np.ndarray:
        """Take over the selected layers; every device goes on from the same local tensors."""
        self.unseen = DeviceState(local=command.payload.copy())
        self.states = {device: replace(state, local=self.unseen.local) for device, state in self.states.items()}
        return messages.NO_RECORD.zeros(0)

    def evaluate(self, command: Command) -> np.ndarray:
        """Confusion matrices: each device's own share with its own local tensors, and a part of the whole split."""
        record = messages.evaluation_record(self.num_classes).zeros(1)
        size = self.config.evaluate.batch_size
        # Interleaved batches give every worker short and long texts alike.
        everything = evaluation_batches(self.validation, np.arange(len(self.validation)), size)
        mine = islice(everything, self.index, None, self.num_workers)
        tensors = self.tuning.merge(command.payload, self.unseen.local, command.layers)
        record["global"] = evaluate(self.backbone, self.tuning, tensors, self.validation, mine, self.num_classes)
        if not self.unseen.local.size:
            record["personal"] = record["global"]
            return record
        for device in self.devices:
            state = self.states.get(device, self.unseen)
            tensors = self.tuning.merge(command.payload, state.local, command.layers)
            own = evaluation_batches(self.validation, self.partition.validation[device], size)
            record["personal"] += evaluate(self.backbone, self.tuning, tensors, self.validation, own, self.num_classes)
        return record

    def save(self, command: Command) -> np.ndarray:
        """Write this rank's device states into the checkpoint under way."""
        record = messages.saved_record().zeros(1)
        digest = self.checkpoints.save_devices(command.round, self.index + 1, self.states, self.tuning, command.layers)
        record[0] = (self.index + 1, digest)
        return record

    def restore(self, command: Command) -> np.ndarray:
        """Read the states of the devices that live here from a checkpoint, whichever rank wrote them."""
        self.states = self.checkpoints.load_devices(command.round, set(self.devices), self.tuning, command.layers)
        return messages.NO_RECORD.zeros(0)

    def _sampled(self, round_index: int) -> list[int]:
        mine = set(self.devices)
        return [device for device in sample_devices(self.config, round_index) if device in mine]

    def _one_batch(self, device: int, purpose: str, size: int) -> np.ndarray:
        rng = generator(self.config.seed, purpose=purpose, device=device)
        return rng.permutation(self.partition.train[device])[:size]
