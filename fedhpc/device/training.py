"""The local updates of a round, and the upload records that they fill in."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedhpc.attack.attack import bad_devices, make_attack
from fedhpc.checkpoint.device_state import NEXT_PERSONAL, PERSONAL, UnfinishedUpdate
from fedhpc.checkpoint.state_file import RoundProgress
from fedhpc.config import Config
from fedhpc.data.prepared import Split
from fedhpc.device.curriculum import Batches, easy_first, some_of
from fedhpc.device.device_states import DeviceStates
from fedhpc.device.local_update import Assignment, DeviceUpdate, epoch_batches, local_updates
from fedhpc.device.measuring import Measurements
from fedhpc.device.round_context import RoundContext
from fedhpc.errors import CheckpointError
from fedhpc.exchange import Exchange, messages
from fedhpc.exchange.encoding import Encoding, Upload
from fedhpc.federation.partition import Partition
from fedhpc.federation.sampling import batches_per_epoch, local_steps
from fedhpc.federation.schedule import learning_rate
from fedhpc.methods import Method, SummedMethod
from fedhpc.methods.updates import Fault, distance, fault_of
from fedhpc.model.backbone import Backbone
from fedhpc.privacy.clipping import term
from fedhpc.seeding import generator
from fedhpc.tuning import Tuning


@dataclass(kw_only=True)
class Training:
    """Trains the devices of one rank, pack by pack; what they keep goes into `states`."""

    config: Config
    split: Split
    partition: Partition
    backbone: Backbone
    tuning: Tuning
    exchange: Exchange
    method: Method
    encoding: Encoding
    measurements: Measurements
    states: DeviceStates

    def __post_init__(self) -> None:
        self._attack, self._bad = make_attack(self.config), bad_devices(self.config)

    def train(
        self, pack: Sequence[int], context: RoundContext, progress: RoundProgress, records: Mapping[int, np.ndarray]
    ) -> None:
        """The local updates of a pack, but for what was done before a stop.

        Args:
            progress: what is done of the round; grows.
            records: device -> its upload record, filled in.
        """
        began = time.perf_counter()
        finished, unfinished = progress.finished, progress.unfinished
        waiting = [device for device in pack if device not in finished]
        if not waiting:
            return
        upload = Upload.of(context.params.size, self.encoding, self.method)
        # Before anything is taken out: what a stop interrupts here is computed again.
        plans = {device: self._curriculum(device, context.round) for device in waiting}
        if self.method.has_personal:
            self._train_personal(waiting, plans, context)
        assignments = [
            Assignment(
                device=device,
                state=(state := self.states[device]),
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
                    self._upload(device, update, context, upload, records[device])
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
            split=self.split,
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
        states = {device: self.states[device] for device in devices}
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
                self.states.keep(device, replace(states[device], kept=kept))

    def _curriculum(self, device: int, round_index: int) -> Batches | None:
        """A device's batches of a round where a curriculum orders them; measured when it first takes part."""
        if self.config.curriculum.order == "random":
            return None
        examples, state = self.partition.train[device], self.states[device]
        rng = generator(self.config.seed, purpose="curriculum batches", device=device)
        given = epoch_batches(examples, self.split.lengths[examples], self.config.device.batch_size, rng)
        traces = state.traces
        if traces is None:
            traces = self.measurements.fisher_traces(given)
            self.states.keep(device, replace(state, traces=traces))
        if len(traces) != len(given):
            raise CheckpointError(f"device {device}: Fisher information of {len(traces)} batches, not {len(given)}")
        used = batches_per_epoch(self.config, len(examples), round_index)
        plan = easy_first(given, traces)[:used] * self.config.device.epochs
        rng = generator(self.config.seed, purpose="curriculum steps", round_index=round_index, device=device)
        return some_of(plan, local_steps(self.config, len(examples), round_index), rng)

    def _upload(
        self, device: int, update: DeviceUpdate, context: RoundContext, upload: Upload, record: np.ndarray
    ) -> None:
        """Fill in the upload record of an update, whose state is kept if all of it is sound."""
        before, start = self.states[device], context.params
        personal = before.kept.get(NEXT_PERSONAL)
        if device in self._bad:
            rng = generator(self.config.seed, purpose="attack", round_index=context.round, device=device)
            update = replace(update, params=self._attack.upload(update.params, start, rng))
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
            for part, vector in zip((upload.payloads, upload.gradients), [payload, *gradient], strict=False):
                (place,) = part(record[None])
                if not np.may_share_memory(place, vector):
                    place[:] = vector
            local_fault = fault_of(update.state.local, before.local, num_steps=steps, learning_rate=rate)
            self.states.keep(device, replace(update.state if local_fault == Fault.NONE else before, kept=kept))
        elif personal is not None:
            kept = {name: vector for name, vector in before.kept.items() if name != NEXT_PERSONAL}
            self.states.keep(device, replace(before, kept=kept))
        (header,) = messages.upload_headers(record[None])
        header["device"], header["loss"], header["num_steps"] = device, update.loss, steps
        header["num_examples"], header["fault"] = update.num_examples, fault
        header["norm"] = 0.0 if fault == Fault.NONE else distance(update.params, start)
