"""The devices' side: a worker holds the devices that live on its rank and answers the server's commands."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from fedhpc.attack.attack import attacked_labels
from fedhpc.checkpoint.device_state import DeviceState
from fedhpc.checkpoint.files import Position
from fedhpc.checkpoint.state_file import RoundProgress, local_file, read_local_file
from fedhpc.checkpoint.store import Checkpoints
from fedhpc.config import Config
from fedhpc.data.prepared import PreparedData
from fedhpc.device.answering import Answering
from fedhpc.device.device_states import DeviceStates
from fedhpc.device.evaluation import Evaluation
from fedhpc.device.measuring import Measurements
from fedhpc.device.round_context import RoundContext
from fedhpc.device.training import Training
from fedhpc.errors import Halt
from fedhpc.exchange import Exchange, MpiExchange, messages
from fedhpc.exchange.encoding import Upload, make_encoding
from fedhpc.exchange.exact_sum import SumSize, Terms
from fedhpc.exchange.messages import Command, Op
from fedhpc.exchange.secure.participants import Participants
from fedhpc.exchange.secure.records import PUBLIC_KEYS
from fedhpc.federation.partition import Partition
from fedhpc.federation.sampling import (
    Homes,
    population,
    sample_devices,
    training_devices,
    upload_counts,
)
from fedhpc.job.background import Background
from fedhpc.methods import make_method
from fedhpc.methods.updates import Fault
from fedhpc.model.backbone import Backbone
from fedhpc.tuning import Tuning

NO_ROUND = -1
NO_RECORDS = messages.NO_RECORD.zeros(0)


def serve(exchange: MpiExchange, worker: "Worker") -> Op:
    """Receive, update the local devices, reply, until the server says how to end."""
    while (command := exchange.receive()).op not in (Op.FINISH, Op.SUSPEND):
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
        split = data.split("train")
        labels = attacked_labels(config, split.labels, partition.train, len(data.description.class_names))
        split = replace(split, labels=labels)
        self.tuning = tuning
        self.exchange = exchange
        self.measurements = Measurements(config, split, partition, backbone, tuning, exchange.beat)
        parts = (config, data, partition, backbone, tuning, exchange)
        self.evaluation = Evaluation(*parts)
        self.answering = Answering(*parts) if config.evaluate.generate else None
        self.checkpoints = Checkpoints(config.run_dir)
        self.writing = Background(exchange.fail)
        self.counts = upload_counts(config, partition, split.num_terms)
        self.method = make_method(config.server, population(config, self.counts))
        self.encoding = make_encoding(config, self.method)
        self.keeps = (
            bool(self.encoding.keeps or self.method.keeps or self.method.has_personal)
            or config.device.keeps_moments
            or config.curriculum.order != "random"
        )
        """Whether a device keeps more between its rounds than its own layers."""
        self.trains_local = False
        """Whether devices train tensors of their own."""
        self.states = DeviceStates()
        self.training = Training(
            config=config,
            split=split,
            partition=partition,
            backbone=backbone,
            tuning=tuning,
            exchange=exchange,
            method=self.method,
            encoding=self.encoding,
            measurements=self.measurements,
            states=self.states,
        )
        self.progress = RoundProgress(round=NO_ROUND)
        self.participants = Participants([])
        """In the present round of secure aggregation."""
        self.start_over()

    def start_over(self) -> None:
        """Forget all that the server did not tell, and take the share of this rank's new number."""
        self.index, self.num_workers = max(0, self.exchange.rank - 1), self.exchange.num_workers
        self.homes = Homes(self.config.federation.num_devices, self.num_workers)
        self.share = self.homes.devices_of(self.index)
        """This worker's devices in work that needs no device's state."""
        self.states.replace({})
        self.progress = RoundProgress(round=NO_ROUND)
        self.tuning.added = {}

    def handle(self, command: Command) -> np.ndarray | None:
        """Do what the server asks; the records to reply with, or None if it was halted."""
        actions = {
            Op.SCORE: self.score,
            Op.SELECT: self.select,
            Op.PROBE: self.probe,
            Op.RESTORE: self.restore,
            Op.TRAIN: self.train_devices,
            Op.RATIO: self.ratio,
            Op.EVALUATE: self.evaluate,
            Op.GENERATE: self.generate,
            Op.SAVE: self.save,
            Op.ADD: self.add,
            Op.KEYS: self.draw_keys,
            Op.SHARES: self.send_shares,
            Op.UNMASK: self.unmask,
        }
        if command.op not in actions:
            return NO_RECORDS
        try:
            return actions[command.op](command)
        except Halt:
            return None

    def train_devices(self, command: Command) -> np.ndarray:
        """Local updates of the packs placed here, but for what was done before an interruption."""
        if self.progress.round != command.round:
            self.progress = RoundProgress(round=command.round)
        (packs, workers), context = command.packs(), self._context(command, self.method.sends)
        self._take_over(self.homes.move(packs, workers), context)
        mine = [pack for pack, worker in zip(packs, workers, strict=True) if worker == self.index]
        record, count = Upload.of(context.params.size, self.encoding, self.method).record, sum(map(len, mine))
        is_masked = self.encoding.masked_among > 0
        records = (self.exchange.buffer if is_masked else self.exchange.rows)(record, count)
        rows = dict(zip((device for pack in mine for device in pack), records, strict=True))
        for device in rows.keys() & self.progress.finished.keys():
            rows[device][:] = self.progress.finished[device]
            self.progress.finished[device] = rows[device]
        for device, row in rows.items():  # of those that are finished too: earlier versions wrote none
            messages.upload_headers(row[None])["count"] = self.counts[device]
        done = 0
        for pack in mine:
            self.training.train(pack, context, self.progress, rows)
            done += len(pack)
            if not self.encoding.num_sums:
                self.exchange.send_ahead(records, done)
        if num_sums := self.encoding.num_sums:
            size = self.encoding.length(context.params.size)
            of = SumSize(num_sums=num_sums, size=size, num_terms=command.placed.size, masked=is_masked)
            terms = Terms.of_uploads(records, of)
            if is_masked:
                headers = messages.upload_headers(records)
                sound = headers["device"][headers["fault"] == Fault.NONE].tolist()
                terms = self.participants.masked(terms, sound, self.exchange.progress)
                records = records[:, : messages.UPLOAD_HEADER_FLOATS]
            self.exchange.add_up(terms)
        return records

    def draw_keys(self, command: Command) -> np.ndarray:
        """Step 0 of secure aggregation, of the round's devices that are here."""
        placed = command.placed[command.placed["worker"] == self.index]
        self.participants = Participants(placed["device"].tolist())
        return self.participants.public_keys()

    def send_shares(self, command: Command) -> np.ndarray:
        """Step 1."""
        return self.participants.boxes(command.payload.view(PUBLIC_KEYS.dtype))

    def unmask(self, command: Command) -> np.ndarray:
        """Step 3; the secrets are of no more use then."""
        done, self.participants = self.participants, Participants([])
        return done.answers(command.payload, command.placed["device"].tolist())

    def _take_over(self, moves: list[tuple[int, int, int]], context: RoundContext) -> None:
        """Pass on the states of devices that train elsewhere from now on, and take those that come."""
        leaving = [(new, *self.states.pop(device)) for device, old, new in moves if old == self.index]
        coming = [(device, old) for device, old, new in moves if new == self.index]
        if not self.has_states:
            return
        layers = context.layers
        outgoing = [
            (new, bytes([touched]) + (local_file(state, context.round, layers, self.tuning) if state else b""))
            for new, state, touched in leaving
        ]
        received = self.exchange.move_states(outgoing, [old for _, old in coming])
        for (device, _), data in zip(coming, received, strict=True):
            file, name, local = data[1:], f"state of device {device}", self.states.unseen.local
            state = read_local_file(file, name, layers, self.tuning, local) if file else None
            self.states.add(device, state, touched=bool(data[0]))

    @property
    def has_states(self) -> bool:
        """Whether devices keep anything between their rounds; in a warm-up they have taken steps, if no more."""
        return self.keeps or self.trains_local or self.config.selection.is_automatic

    def _context(self, command: Command, sends: Sequence[str] = ()) -> RoundContext:
        """The round that a command is about; its payload is P^t and the vectors of these names."""
        params, *sent = np.split(command.payload, len(sends) + 1)
        assert params.size == self.tuning.exchanged(command.layers).size
        named = dict(zip(sends, sent, strict=True))
        return RoundContext(
            round=command.round,
            layers=command.layers,
            pack=command.pack,
            clip=command.clip,
            params=params,
            sent=named,
        )

    def score(self, command: Command) -> np.ndarray:
        """Layer scores of the devices in this worker's share that can train."""
        return self.measurements.layer_scores([d for d in training_devices(self.config) if d in self.share])

    def probe(self, command: Command) -> np.ndarray:
        """Seconds of a step by the number of devices side by side."""
        return self.measurements.step_seconds(
            self.share, self._context(command), self.states.unseen, ranks_here=self.exchange.ranks_here
        )

    def ratio(self, command: Command) -> np.ndarray:
        """Lossless ratios of the sampled devices in this worker's share."""
        devices = [device for device in sample_devices(self.config, command.round) if device in self.share]
        return self.measurements.lossless_ratios(devices, self._context(command), self.states.unseen)

    def select(self, command: Command) -> np.ndarray:
        """Take over the selected layers; every device goes on from the same local tensors."""
        self.method.layout = self.tuning.exchanged(command.layers)
        local, added = np.split(command.payload, [self.tuning.local(command.layers).size])
        self.tuning.added = self.tuning.added_layout.views(added.copy()) if added.size else {}
        self.trains_local = self.tuning.trains_local(command.layers)
        if self.tuning.freezes_others:
            self.tuning.frozen = self.tuning.other_layers(command.layers)
        self.states.start_from(local.copy(), self.tuning.kept_elements(command.layers))
        return NO_RECORDS

    def add(self, command: Command) -> np.ndarray:
        """Add what the server's last step adds to the frozen weights."""
        size = self.tuning.exchanged(command.layers).size
        self.tuning.added = self.tuning.with_products(list(command.payload.reshape(-1, size)), command.layers)
        return NO_RECORDS

    def evaluate(self, command: Command) -> np.ndarray:
        """Right and wrong with the devices' own local tensors, and with the server's."""
        return self.evaluation.record(
            self._context(command), self.states.unseen, self._evaluated_states, self.homes, self.index
        )

    def generate(self, command: Command) -> np.ndarray:
        """Answers with the server's tensors, and with the devices' own."""
        assert self.answering is not None
        return self.answering.records(
            self._context(command), self.states.unseen, self._evaluated_states, self.homes, self.index
        )

    @property
    def _evaluated_states(self) -> dict[int, DeviceState] | None:
        """The devices' own, unless there are none or nothing may be said of single devices."""
        has_own = self.trains_local or self.method.has_personal
        return self.states.known if has_own and not self.config.privacy.is_on else None

    def save(self, command: Command) -> np.ndarray:
        """Begin to write the states of the devices that took part since the last checkpoint."""
        changed = self.states.take_changed()
        progress = self.progress if self.progress.round == command.round else None
        self.writing.start(
            partial(
                self.checkpoints.save_devices,
                changed if self.has_states else {},
                progress,
                generation=command.generation,
                round_index=command.round,
                rank=self.index + 1,
                layers=command.layers,
                tuning=self.tuning,
                post=self.exchange.post,
            )
        )
        return NO_RECORDS

    def restore(self, command: Command) -> np.ndarray:
        """Read the states of the devices that live here from a checkpoint, whichever rank wrote them."""
        position = Position(command.round, command.generation)
        self.homes.move(*command.packs())
        mine = set(self.homes.devices_of(self.index))
        states, self.progress = self.checkpoints.load_devices(
            position, mine, self.tuning, command.layers, self.states.unseen.local
        )
        self.states.replace(states)
        words = Upload.of(self.tuning.exchanged(command.layers).size, self.encoding, self.method).record.shape
        self.progress.check(words, with_moments=self.config.device.optimizer == "adamw")
        return NO_RECORDS
