"""The devices' side: a worker holds the devices that live on its rank and answers the server's commands."""

import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from fedhpc import messages
from fedhpc.background import Background
from fedhpc.checkpoint import Checkpoints, Position
from fedhpc.config import Config
from fedhpc.data import PreparedData
from fedhpc.errors import Halt
from fedhpc.evaluate import evaluate, evaluation_batches
from fedhpc.exchange import Exchange, MpiExchange
from fedhpc.federation import devices_of, sample_devices
from fedhpc.local_update import DeviceState, DeviceUpdate, UnfinishedUpdate, learning_rate, local_update
from fedhpc.messages import Command, Op
from fedhpc.models import Backbone
from fedhpc.partition import Partition
from fedhpc.seeding import generator
from fedhpc.selection import layer_score
from fedhpc.spectrum import lossless_ratio
from fedhpc.state_file import RoundProgress
from fedhpc.tuning import Tuning
from fedhpc.updates import Vector, fault_of

NO_ROUND = -1
NOTHING = messages.NO_RECORD.zeros(0)


def serve(exchange: MpiExchange, worker: "Worker") -> Op:
    """Receive, update the local devices, reply, until the server says how to end."""
    while (command := exchange.receive()).op not in (Op.STOP, Op.SUSPEND):
        exchange.reply(worker.handle(command))
    return command.op


class Worker:
    """The devices of one rank."""

    def __init__(
        self,
        config: Config,
        data: PreparedData,
        partition: Partition,
        backbone: Backbone,
        tuning: Tuning,
        exchange: Exchange,
    ) -> None:
        self.config = config
        self.train, self.validation = data.split("train"), data.split("validation")
        self.num_classes = len(data.description.class_names)
        self.partition = partition
        self.backbone = backbone
        self.tuning = tuning
        self.exchange = exchange
        self.checkpoints = Checkpoints(config.run_dir)
        self.writing = Background(exchange.fail)
        self.devices: list[int] = []
        self.states: dict[int, DeviceState] = {}
        self.touched: set[int] = set()
        """Devices whose state is newer than the last checkpoint."""
        self.progress = RoundProgress(round=NO_ROUND)
        self.unseen = DeviceState(local=np.empty(0, np.float32))
        """The state of a device before its first round."""
        self.start_over()

    def start_over(self) -> None:
        """Forget all that the server did not tell, and take the devices of this rank's new number."""
        self.writing.finish()
        self.index, self.num_workers = max(0, self.exchange.rank - 1), self.exchange.num_workers
        self.devices = devices_of(self.index, self.config.federation.num_devices, self.num_workers)
        self.states, self.touched, self.progress = {}, set(), RoundProgress(round=NO_ROUND)

    def handle(self, command: Command) -> np.ndarray | None:
        """Do what the server asks; the records to reply with, or None if it was halted."""
        actions = {
            Op.SCORE: self.score,
            Op.SELECT: self.select,
            Op.RESTORE: self.restore,
            Op.TRAIN: self.train_devices,
            Op.RATIO: self.ratio,
            Op.EVALUATE: self.evaluate,
            Op.SAVE: self.save,
        }
        if command.op not in actions:
            return NOTHING
        try:
            return actions[command.op](command)
        except Halt:
            return None

    def train_devices(self, command: Command) -> np.ndarray:
        """Local updates of the sampled devices that live here, but for what was done before an interruption."""
        if self.progress.round != command.round:
            self.progress = RoundProgress(round=command.round)
        finished = self.progress.finished
        devices = self._sampled(command.round)
        for device in devices:
            if device not in finished:
                finished[device] = self._train(device, command)
        if not devices:
            return messages.upload_record(command.payload.size).zeros(0)
        return np.stack([finished[device] for device in devices])

    def _train(self, device: int, command: Command) -> np.ndarray:
        """One device's local update; its upload record."""
        began = time.perf_counter()
        state = self.states.get(device, self.unseen)
        update = local_update(
            self.config,
            self.backbone,
            self.tuning,
            command.layers,
            start=command.payload,
            state=state,
            split=self.train,
            examples=self.partition.train[device],
            round_index=command.round,
            device=device,
            begun=self.progress.unfinished.pop(device, None),
            beat=self.exchange.beat,
        )
        if isinstance(update, UnfinishedUpdate):
            if len(update.losses):
                self.progress.unfinished[device] = update
            raise Halt
        if self._is_sound(update, command.payload, state):
            self.states[device] = update.state
            self.touched.add(device)
        record = messages.upload_record(command.payload.size).zeros(1)
        (header,), (params,) = messages.upload_parts(record)
        params[:] = update.params
        header["device"], header["loss"] = device, update.loss
        header["num_examples"], header["num_steps"] = update.num_examples, update.num_steps
        header["seconds"] = time.perf_counter() - began
        return record[0]

    def _is_sound(self, update: DeviceUpdate, start: Vector, state: DeviceState) -> bool:
        """Whether a device may keep what it has made of its state; the server looks at the upload itself."""
        rate = learning_rate(self.config, self.progress.round)
        pairs = ((update.params, start), (update.state.local, state.local))
        return not any(fault_of(new, old, num_steps=update.num_steps, learning_rate=rate) for new, old in pairs)

    def score(self, command: Command) -> np.ndarray:
        """Layer scores of every device here, on one batch each."""
        selection = self.config.selection
        records = messages.score_record(self.tuning.shape.num_layers).zeros(len(self.devices))
        self.backbone.training_mode(False)
        for record, device in zip(records, self.devices, strict=True):
            self.exchange.beat(f"scoring layers on device {device}")
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
            self.exchange.beat(f"estimating the lossless ratio on device {device}")
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
        return NOTHING

    def evaluate(self, command: Command) -> np.ndarray:
        """Confusion matrices: each device's own share with its own local tensors, and a part of the whole split."""
        record = messages.evaluation_record(self.num_classes).zeros(1)
        size = self.config.evaluate.batch_size
        # Interleaved batches give every worker short and long texts alike.
        everything = evaluation_batches(self.validation, np.arange(len(self.validation)), size)
        mine = islice(everything, self.index, None, self.num_workers)
        record["global"] = self._confusion(command, self.unseen, mine)
        if not self.unseen.local.size:
            record["personal"] = record["global"]
            return record
        for device in self.devices:
            own = evaluation_batches(self.validation, self.partition.validation[device], size)
            record["personal"] += self._confusion(command, self.states.get(device, self.unseen), own)
        return record

    def save(self, command: Command) -> np.ndarray:
        """Begin to write the states of the devices that took part since the last checkpoint."""
        states = {device: self.states[device] for device in sorted(self.touched)}
        states = {device: state for device, state in states.items() if state.local.size or state.moments}
        self.touched.clear()
        progress = self.progress if self.progress.round == command.round else None
        self.writing.start(
            partial(
                self.checkpoints.save_devices,
                states,
                progress,
                generation=command.generation,
                round_index=command.round,
                rank=self.index + 1,
                layers=command.layers,
                layouts=self.tuning,
                post=self.exchange.post,
            )
        )
        return NOTHING

    def restore(self, command: Command) -> np.ndarray:
        """Read the states of the devices that live here from a checkpoint, whichever rank wrote them."""
        position = Position(command.round, command.generation)
        self.states, self.progress = self.checkpoints.load_devices(
            position, set(self.devices), self.tuning, command.layers, self.unseen.local
        )
        self.touched.clear()
        return NOTHING

    def _confusion(self, command: Command, state: DeviceState, batches: Iterator[NDArray[np.int64]]) -> np.ndarray:
        tensors = self.tuning.merge(command.payload, state.local, command.layers)

        def announced() -> Iterator[NDArray[np.int64]]:
            for batch in batches:
                self.exchange.beat("evaluating")
                yield batch

        return evaluate(self.backbone, self.tuning, tensors, self.validation, announced(), self.num_classes)

    def _sampled(self, round_index: int) -> list[int]:
        mine = set(self.devices)
        return [device for device in sample_devices(self.config, round_index) if device in mine]

    def _one_batch(self, device: int, purpose: str, size: int) -> np.ndarray:
        rng = generator(self.config.seed, purpose=purpose, device=device)
        return rng.permutation(self.partition.train[device])[:size]
