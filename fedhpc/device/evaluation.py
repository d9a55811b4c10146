"""Evaluation on the devices' side: the examples of each device with its own layers, all with the server's prompts."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from fedhpc.checkpoint.device_state import DeviceState
from fedhpc.config import Config
from fedhpc.data.prepared import PreparedData
from fedhpc.device.loans import lend, params_by_device
from fedhpc.device.round_context import RoundContext
from fedhpc.evaluate.outcomes import ELSEWHERE, Outcome, make_outcomes
from fedhpc.evaluate.predictions import (
    SERVER,
    DeviceBatch,
    device_batches,
    evaluation_batches,
    evaluation_examples,
    results,
)
from fedhpc.exchange import Exchange
from fedhpc.federation.partition import Partition
from fedhpc.federation.sampling import Homes, sampled_before, spread
from fedhpc.methods.updates import Vector
from fedhpc.model.backbone import Backbone
from fedhpc.tuning import Tuning
from fedhpc.tuning.base import Params


class Evaluation:
    """A worker's part of the evaluations."""

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
        self.split, self.of_device = data.split("validation"), partition.validation
        self.evaluated = partition.evaluated
        self.outcomes = make_outcomes(data.description, config)
        self.backbone = backbone
        self.tuning = tuning
        self.exchange = exchange

    def record(
        self,
        context: RoundContext,
        unseen: DeviceState,
        states: Mapping[int, DeviceState] | None,
        homes: Homes,
        worker: int,
    ) -> np.ndarray:
        """This worker's part of the sums [1]; see `fedhpc.evaluate.outcomes`.

        Args:
            unseen: the state of a device before its first round.
            states: of the devices that live here; None where no device has layers of its own.
            homes: where each device lives.
            worker: this one.
        """
        labels, size = self.split.labels[self.evaluated], self.config.evaluate.batch_size
        count = None if context.round == self.config.federation.rounds else self.config.evaluate.examples
        chosen = self.evaluated[evaluation_examples(labels, count, self.config.seed)]
        sampled: set[int] = set()
        own: Mapping[int, Vector] = {}
        if states is not None:
            sampled = sampled_before(self.config, context.round)
            shares = {device: np.intersect1d(self.of_device[device], chosen) for device in sorted(sampled)}
            batches = device_batches(self.split, shares, size, side_by_side=self.tuning.packable)
            # Before all work: a stop may end that on one worker earlier than on another.
            mine, own = self._shared_out(batches, states, homes, worker)
        params_of = params_by_device(context, unseen, own, self.tuning, self.backbone)
        # Interleaved batches give every worker short and long texts alike.
        everything = islice(evaluation_batches(self.split, chosen, size), worker, None, homes.num_workers)
        shared = self._found([[(SERVER, examples)] for examples in everything], params_of)
        personal = shared
        if states is not None:
            personal = self._found(mine, params_of)
            for device in set(range(len(self.of_device))) - sampled:  # it has what the server has
                personal[self.of_device[device]] = shared[self.of_device[device]]
        record = np.zeros(1, self.outcomes.dtype)
        self.outcomes.fill(record[0], personal, shared, self.split, self.of_device)
        return record

    def _shared_out(
        self, batches: list[DeviceBatch], states: Mapping[int, DeviceState], homes: Homes, worker: int
    ) -> tuple[list[DeviceBatch], dict[int, Vector]]:
        """This worker's batches, and the own layers of their devices: what lives elsewhere is lent."""
        costs = [float(sum(self.split.lengths[examples].sum() for _, examples in batch)) for batch in batches]
        workers = spread([[device for device, _ in batch] for batch in batches], costs, homes)
        placed = list(zip(batches, workers, strict=True))
        own = lend(placed, states, homes, worker, self.exchange)
        return [batch for batch, at in placed if at == worker], own

    def _found(self, batches: list[DeviceBatch], params_of: Callable[[int], Params]) -> Outcome:
        """The outcomes of the batches' examples, with each device's tensors."""
        found = np.full((len(self.split), self.outcomes.numbers), ELSEWHERE, np.int64)

        def announced() -> Iterator[list[tuple[Params, NDArray[np.int64]]]]:
            for batch in batches:
                self.exchange.beat("evaluating")
                yield [(params_of(device), examples) for device, examples in batch]

        of_batch = partial(self.outcomes.of_batch, self.backbone, self.tuning)
        for examples, outcome in results(of_batch, self.backbone, self.split, announced()):
            found[examples] = outcome
        return found
