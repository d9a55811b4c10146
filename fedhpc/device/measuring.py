"""What a rank measures on its devices' examples beside training: layer scores, how hard batches are, lossless ratios,
step times."""

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from itertools import cycle, islice

import numpy as np
from numpy.typing import NDArray

from fedhpc.checkpoint.device_state import DeviceState
from fedhpc.config import Config
from fedhpc.data.prepared import Split
from fedhpc.device.curriculum import Batches, fisher_traces
from fedhpc.device.local_update import Assignment, DeviceUpdate, local_updates
from fedhpc.device.round_context import RoundContext
from fedhpc.exchange import messages
from fedhpc.federation.packing import probe
from fedhpc.federation.partition import Partition
from fedhpc.model.backbone import Backbone
from fedhpc.seeding import generator
from fedhpc.selection import make_strategy
from fedhpc.selection.spectrum import lossless_ratio
from fedhpc.tuning import Tuning


class Measurements:
    """Measures the devices of one rank; each figure is a function of the seed, the device and the round."""

    def __init__(
        self,
        config: Config,
        train: Split,
        partition: Partition,
        backbone: Backbone,
        tuning: Tuning,
        beat: Callable[[str], None],
    ) -> None:
        self.config = config
        self.train = train
        self.partition = partition
        self.backbone = backbone
        self.tuning = tuning
        self.beat = beat

    def layer_scores(self, devices: Sequence[int]) -> np.ndarray:
        """Score records of the devices, from one batch each."""
        strategy = make_strategy(self.config.selection)
        records = messages.score_record(self.tuning.shape.num_layers).zeros(len(devices))
        self.backbone.training_mode(strategy.with_gradients, dropout=False)
        for record, device in zip(records, devices, strict=True):
            self.beat(f"scoring layers on device {device}")
            examples = self._one_batch(device, "score batch", strategy.config.batch_size)
            batch = self.train.batch(examples).to(self.backbone.torch_device)
            record["device"], record["num_examples"] = device, len(self.partition.train[device])
            record["scores"] = strategy.score_layers(self.backbone, self.tuning, self._initial, batch)
        return records

    def fisher_traces(self, batches: Batches) -> NDArray[np.float64]:
        """How hard each batch is before round 0."""
        return fisher_traces(self.backbone, self.tuning, self._initial, self.train, batches, self.beat)

    def lossless_ratios(self, devices: Sequence[int], context: RoundContext, unseen: DeviceState) -> np.ndarray:
        """Ratio records of the devices, from the Hessian on one batch each.

        Args:
            context: the round of the parameters at which the Hessian is taken.
            unseen: the state of a device before its first round.
        """
        records = messages.ratio_record().zeros(len(devices))
        self.backbone.training_mode(False)
        for record, device in zip(records, devices, strict=True):
            examples = self._one_batch(device, "hessian batch", self.config.device.batch_size)
            tensors = self.tuning.merge(context.params, unseen.local, context.layers)
            rng = generator(self.config.seed, purpose="hessian", round_index=context.round, device=device)
            batch = self.train.batch(examples).to(self.backbone.torch_device)
            record["device"], record["num_examples"] = device, len(self.partition.train[device])
            found = lossless_ratio(
                self.backbone,
                self.tuning,
                tensors,
                batch,
                by=self.config.selection.auto_by,
                rng=rng,
                beat=partial(self.beat, f"estimating the lossless ratio on device {device}"),
            )
            for name, value in vars(found).items():
                record[name] = value
        return records

    def step_seconds(
        self, devices: Sequence[int], context: RoundContext, unseen: DeviceState, *, ranks_here: int
    ) -> np.ndarray:
        """The probe record: seconds of a device's step by the number of devices side by side, those with most texts.

        Args:
            context: the round to come; its pack is the largest number to measure.
            unseen: the state of a device before its first round.
            ranks_here: processes that share this host's memory.
        """
        examples, size = self.partition.train, 2 * self.config.device.batch_size

        def some(own: NDArray[np.int64], longest: bool) -> NDArray[np.int64]:
            return (own[np.argsort(-self.train.lengths[own], kind="stable")] if longest else own)[:size]

        candidates = sorted(devices or range(len(examples)), key=lambda device: -len(examples[device]))

        def train(pack: int, longest: bool) -> int:
            assignments = [
                Assignment(device=device, state=unseen, examples=some(examples[device], longest))
                for device in islice(cycle(candidates), pack)
            ]
            updates = local_updates(
                self.config,
                self.backbone,
                self.tuning,
                context.layers,
                start=context.params,
                assignments=assignments,
                split=self.train,
                round_index=context.round,
                pack=pack,
                beat=self.beat,
            )
            return max(update.num_steps for _, update in updates if isinstance(update, DeviceUpdate))

        records = messages.probe_record().zeros(1)
        records["seconds"][0] = probe(train, largest=context.pack, ranks_here=ranks_here)
        return records

    @cached_property
    def _initial(self) -> dict[str, np.ndarray]:
        """All trainable tensors before round 0."""
        return self.tuning.initial(self.config.seed)

    def _one_batch(self, device: int, purpose: str, size: int) -> np.ndarray:
        rng = generator(self.config.seed, purpose=purpose, device=device)
        return rng.permutation(self.partition.train[device])[:size]
