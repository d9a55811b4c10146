"""The devices' side: a worker holds the devices that live on its rank and answers the server's commands."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from fedhpc.attack.attack import bad_devices, make_attack
from fedhpc.checkpoint.device_state import NEXT_PERSONAL, PERSONAL, DeviceState, UnfinishedUpdate
from fedhpc.checkpoint.files import Position
from fedhpc.checkpoint.state_file import RoundProgress, local_file, read_local_file
from fedhpc.checkpoint.store import Checkpoints
from fedhpc.config import Config
from fedhpc.data.prepared import PreparedData, Split
from fedhpc.device.answering import Answering
from fedhpc.device.curriculum import Batches, easy_first, some_of
from fedhpc.device.evaluation import Evaluation
from fedhpc.device.local_update import Assignment, DeviceUpdate, epoch_batches, local_updates
from fedhpc.device.measuring import Measurements
from fedhpc.device.round_context import RoundContext
from fedhpc.errors import CheckpointError, Halt
from fedhpc.exchange import Exchange, MpiExchange, messages
from fedhpc.exchange.encoding import Upload, make_encoding
from fedhpc.exchange.exact_sum import SumSize, Terms
from fedhpc.exchange.messages import Command, Op
from fedhpc.exchange.secure.participants import Participants
from fedhpc.exchange.secure.records import PUBLIC_KEYS
from fedhpc.federation.partition import Partition
from fedhpc.federation.sampling import (
    Homes,
    batches_per_epoch,
    local_steps,
    population,
    sample_devices,
    training_devices,
    upload_counts,
)
from fedhpc.federation.schedule import learning_rate
from fedhpc.job.background import Background
from fedhpc.methods import SummedMethod, make_method
from fedhpc.methods.updates import Fault, distance, fault_of
from fedhpc.model.backbone import Backbone
from fedhpc.privacy.clipping import term
from fedhpc.seeding import generator
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
        self.attack, self.bad = make_attack(config), bad_devices(config)
        self.train = self._as_attacked(data.split("train"), partition, len(data.description.class_names))
        self.partition = partition
        self.backbone = backbone
        self.tuning = tuning
        self.exchange = exchange
        self.measurements = Measurements(config, self.train, partition, backbone, tuning, exchange.beat)
        parts = (config, data, partition, backbone, tuning, exchange)
        self.evaluation = Evaluation(*parts)
        self.answering = Answering(*parts) if config.evaluate.generate else None
        self.checkpoints = Checkpoints(config.run_dir)
        self.writing = Background(exchange.fail)
        self.counts = upload_counts(config, partition, self.train.num_terms)
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
        self.states: dict[int, DeviceState] = {}
        self.touched: set[int] = set()
        """Devices whose state is newer than the last checkpoint."""
        self.progress = RoundProgress(round=NO_ROUND)
        self.unseen = DeviceState(local=np.empty(0, np.float32))
        """The state of a device before its first round."""
        self.participants = Participants([])
        """In the present round of secure aggregation."""
        self.start_over()

    def _as_attacked(self, split: Split, partition: Partition, num_classes: int) -> Split:
        """The training examples, those of bad devices with the classes that these make of them."""
        if not self.bad:
            return split
        labels = np.array(split.labels)
        for device in self.bad:
            own = partition.train[device]
            labels[own] = self.attack.labels(labels[own], num_classes)
        return replace(split, labels=labels)

    def start_over(self) -> None:
        """Forget all that the server did not tell, and take the share of this rank's new number."""
        self.index, self.num_workers = max(0, self.exchange.rank - 1), self.exchange.num_workers
        self.homes = Homes(self.config.federation.num_devices, self.num_workers)
        self.share = self.homes.devices_of(self.index)
        """This worker's devices in work that needs no device's state."""
        self.states, self.touched, self.progress = {}, set(), RoundProgress(round=NO_ROUND)
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
        record, count = self._upload_of(context.params.size).record, sum(map(len, mine))
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
            self._train(pack, context, rows)
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

    def _upload_of(self, size: int) -> Upload:
        return Upload.of(size, self.encoding, self.method)

    def _take_over(self, moves: list[tuple[int, int, int]], context: RoundContext) -> None:
        """Pass on the states of devices that train elsewhere from now on, and take those that come."""
        leaving = [(new, self.states.pop(d, None), d in self.touched) for d, old, new in moves if old == self.index]
        coming = [(device, old) for device, old, new in moves if new == self.index]
        self.touched.difference_update(device for device, old, _ in moves if old == self.index)
        if not self.has_states:
            return
        outgoing = [(new, self._pack_state(state, is_touched, context)) for new, state, is_touched in leaving]
        received = self.exchange.move_states(outgoing, [old for _, old in coming])
        for (device, _), data in zip(coming, received, strict=True):
            self._unpack_state(device, data, context)

    def _pack_state(self, state: DeviceState | None, is_touched: bool, context: RoundContext) -> bytes:
        """What another worker needs of a device."""
        return bytes([is_touched]) + (local_file(state, context.round, context.layers, self.tuning) if state else b"")

    def _unpack_state(self, device: int, data: bytes, context: RoundContext) -> None:
        if data[0]:
            self.touched.add(device)
        if data[1:]:
            name = f"state of device {device}"
            self.states[device] = read_local_file(data[1:], name, context.layers, self.tuning, self.unseen.local)

    def _train(self, pack: list[int], context: RoundContext, records: dict[int, np.ndarray]) -> None:
        """The local updates of a pack; their upload records."""
        began = time.perf_counter()
        finished, unfinished = self.progress.finished, self.progress.unfinished
        waiting = [device for device in pack if device not in finished]
        if not waiting:
            return
        upload = self._upload_of(context.params.size)
        # Before anything is taken out: what a stop interrupts here is computed again.
        plans = {device: self._curriculum(device, context.round) for device in waiting}
        if self.method.has_personal:
            self._train_personal(waiting, plans, context)
        assignments = [
            Assignment(
                device=device,
                state=(state := self.states.get(device, self.unseen)),
                examples=self.partition.train[device],
                begun=unfinished.pop(device, None),
                rule=self.method.local_rule(context.sent, state.kept),
                plan=plans[device],
                out=upload.payloads(records[device][None])[0] if self.encoding.is_plain else None,
            )
            for device in waiting
        ]
        try:
            for device, update in self._updates(assignments, context, with_gradient=self.method.uploads_gradient):
                if isinstance(update, UnfinishedUpdate):
                    unfinished[device] = update
                else:
                    self._upload(device, update, context, records[device])
                    finished[device] = records[device]
        finally:
            sizes = {device: len(self.partition.train[device]) for device in waiting}
            steps = {device: local_steps(self.config, size, context.round) for device, size in sizes.items()}
            share = (time.perf_counter() - began) / sum(steps.values())
            for device in waiting:
                if device in finished:
                    messages.upload_headers(finished[device][None])["seconds"] = share * steps[device]

    def _updates(
        self, assignments: Sequence[Assignment], context: RoundContext, *, with_gradient: bool = False
    ) -> Iterator[tuple[int, DeviceUpdate | UnfinishedUpdate]]:
        return local_updates(
            self.config,
            self.backbone,
            self.tuning,
            context.layers,
            start=context.params,
            assignments=assignments,
            split=self.train,
            round_index=context.round,
            pack=context.pack,
            with_gradient=with_gradient,
            beat=self.exchange.beat,
        )

    def _train_personal(
        self, devices: Sequence[int], plans: Mapping[int, Batches | None], context: RoundContext
    ) -> None:
        """Train the parameters of the devices' own; not once more after a stop that came later in the round.

        Devices that are trained side by side are so again: their bits depend on that.
        """
        states = {device: self.states.get(device, self.unseen) for device in devices}
        states = {device: state for device, state in states.items() if NEXT_PERSONAL not in state.kept}
        assignments = [
            Assignment(
                device=device,
                state=replace(state, moments=None),
                examples=self.partition.train[device],
                rule=self.method.personal_rule(),
                plan=plans[device],
                begin=state.kept.get(PERSONAL),
            )
            for device, state in states.items()
        ]
        updates = list(self._updates(assignments, context))  # a stop before the last one leaves none
        for device, update in updates:
            if isinstance(update, DeviceUpdate):
                kept = states[device].kept | {NEXT_PERSONAL: update.params}
                self.states[device] = replace(states[device], kept=kept)
                self.touched.add(device)

    @property
    def has_states(self) -> bool:
        """Whether devices keep anything between their rounds; in a warm-up they have taken steps, if no more."""
        return self.keeps or self.trains_local or self.config.selection.is_automatic

    def _curriculum(self, device: int, round_index: int) -> Batches | None:
        """A device's batches of a round where a curriculum orders them; measured when it first takes part."""
        if self.config.curriculum.order == "random":
            return None
        examples, state = self.partition.train[device], self.states.get(device, self.unseen)
        rng = generator(self.config.seed, purpose="curriculum batches", device=device)
        given = epoch_batches(examples, self.train.lengths[examples], self.config.device.batch_size, rng)
        traces = state.traces
        if traces is None:
            traces = self.measurements.fisher_traces(given)
            self.states[device] = replace(state, traces=traces)
            self.touched.add(device)
        if len(traces) != len(given):
            raise CheckpointError(f"device {device}: Fisher information of {len(traces)} batches, not {len(given)}")
        used = batches_per_epoch(self.config, len(examples), round_index)
        plan = easy_first(given, traces)[:used] * self.config.device.epochs
        rng = generator(self.config.seed, purpose="curriculum steps", round_index=round_index, device=device)
        return some_of(plan, local_steps(self.config, len(examples), round_index), rng)

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

    def _upload(self, device: int, update: DeviceUpdate, context: RoundContext, record: np.ndarray) -> None:
        """Fill in the upload record of an update, whose state is kept if all of it is sound."""
        before, start = self.states.get(device, self.unseen), context.params
        personal = before.kept.get(NEXT_PERSONAL)
        if device in self.bad:
            rng = generator(self.config.seed, purpose="attack", round_index=context.round, device=device)
            update = replace(update, params=self.attack.upload(update.params, start, rng))
        steps, rate = update.num_steps, learning_rate(self.config, context.round)
        fault = fault_of(update.params, start, num_steps=steps, learning_rate=rate)
        gradient = [] if update.gradient is None else [update.gradient]
        if fault == Fault.NONE and not all(np.isfinite(vector).all() for vector in gradient):
            fault = Fault.NAN
        if fault == Fault.NONE:
            payload, kept = self.encoding.encode(update.params, start, before.kept, num_steps=steps, learning_rate=rate)
            kept |= self.method.kept_after(
                start, update.params, context.sent, before.kept, num_steps=steps, learning_rate=rate
            )
            if personal is not None:
                kept[PERSONAL] = personal if np.isfinite(personal).all() else before.kept.get(PERSONAL, start)
            if self.config.privacy.is_on:
                assert isinstance(self.method, SummedMethod)  # the configuration refuses the others
                with_flag = self.config.privacy.quantile is not None
                payload = term(payload, self.method.origin(start), context.clip, with_flag=with_flag)
            upload = self._upload_of(start.size)
            for part, vector in zip((upload.payloads, upload.gradients), [payload, *gradient], strict=False):
                (place,) = part(record[None])
                if not np.may_share_memory(place, vector):
                    place[:] = vector
            local_fault = fault_of(update.state.local, before.local, num_steps=steps, learning_rate=rate)
            self.states[device] = replace(update.state if local_fault == Fault.NONE else before, kept=kept)
            self.touched.add(device)
        elif personal is not None:
            kept = {name: vector for name, vector in before.kept.items() if name != NEXT_PERSONAL}
            self.states[device] = replace(before, kept=kept)
        (header,) = messages.upload_headers(record[None])
        header["device"], header["loss"], header["num_steps"] = device, update.loss, steps
        header["num_examples"], header["fault"] = update.num_examples, fault
        header["norm"] = 0.0 if fault == Fault.NONE else distance(update.params, start)

    def score(self, command: Command) -> np.ndarray:
        """Layer scores of the devices in this worker's share that can train."""
        return self.measurements.layer_scores([d for d in training_devices(self.config) if d in self.share])

    def probe(self, command: Command) -> np.ndarray:
        """Seconds of a step by the number of devices side by side."""
        return self.measurements.step_seconds(
            self.share, self._context(command), self.unseen, ranks_here=self.exchange.ranks_here
        )

    def ratio(self, command: Command) -> np.ndarray:
        """Lossless ratios of the sampled devices in this worker's share."""
        devices = [device for device in sample_devices(self.config, command.round) if device in self.share]
        return self.measurements.lossless_ratios(devices, self._context(command), self.unseen)

    def select(self, command: Command) -> np.ndarray:
        """Take over the selected layers; every device goes on from the same local tensors."""
        self.method.layout = self.tuning.exchanged(command.layers)
        local, added = np.split(command.payload, [self.tuning.local(command.layers).size])
        self.unseen = DeviceState(local=local.copy())
        self.tuning.added = self.tuning.added_layout.views(added.copy()) if added.size else {}
        self.trains_local = self.tuning.trains_local(command.layers)
        if self.tuning.freezes_others:
            self.tuning.frozen = self.tuning.other_layers(command.layers)
        kept = self.tuning.kept_elements(command.layers)
        self.states = {device: state.narrowed(kept, self.unseen.local) for device, state in self.states.items()}
        return NO_RECORDS

    def add(self, command: Command) -> np.ndarray:
        """Add what the server's last step adds to the frozen weights."""
        size = self.tuning.exchanged(command.layers).size
        self.tuning.added = self.tuning.with_products(list(command.payload.reshape(-1, size)), command.layers)
        return NO_RECORDS

    def evaluate(self, command: Command) -> np.ndarray:
        """Right and wrong with the devices' own local tensors, and with the server's."""
        return self.evaluation.record(
            self._context(command), self.unseen, self._evaluated_states, self.homes, self.index
        )

    def generate(self, command: Command) -> np.ndarray:
        """Answers with the server's tensors, and with the devices' own."""
        assert self.answering is not None
        return self.answering.records(
            self._context(command), self.unseen, self._evaluated_states, self.homes, self.index
        )

    @property
    def _evaluated_states(self) -> dict[int, DeviceState] | None:
        """The devices' own, unless there are none or nothing may be said of single devices."""
        has_own = self.trains_local or self.method.has_personal
        return self.states if has_own and not self.config.privacy.is_on else None

    def save(self, command: Command) -> np.ndarray:
        """Begin to write the states of the devices that took part since the last checkpoint."""
        states = {device: self.states[device] for device in sorted(self.touched)} if self.has_states else {}
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
        self.states, self.progress = self.checkpoints.load_devices(
            position, mine, self.tuning, command.layers, self.unseen.local
        )
        self.touched.clear()
        words = self._upload_of(self.tuning.exchanged(command.layers).size).record.shape
        self.progress.check(words, with_moments=self.config.device.optimizer == "adamw")
        return NO_RECORDS
