"""Rank 0 selects the layers that are exchanged: before round 0, or after the warm-up of an automatic ratio."""

from collections.abc import Iterable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from fedhpc.checkpoint.state_file import RunState
from fedhpc.exchange import Exchange, messages
from fedhpc.exchange.messages import Command, Op
from fedhpc.federation.sampling import sample_devices, training_devices
from fedhpc.job.log import log
from fedhpc.selection import make_strategy
from fedhpc.selection.ratio import describe_ratio, describe_spread, global_ratio
from fedhpc.selection.strategy import global_scores
from fedhpc.server.job import Job


class LayerSelector:
    """Asks the devices for what the selection depends on, and selects."""

    def __init__(self, job: Job, exchange: Exchange) -> None:
        self._config, self._exchange = job.config, exchange
        self._num_layers = job.shape.num_layers
        self._strategy = make_strategy(job.config.selection)

    def at_the_start(self) -> tuple[tuple[int, ...], NDArray[np.float64] | None]:
        """The layers of round 0, all of them before a warm-up; scores [L], if the strategy has some."""
        selection = self._config.selection
        scores = self._score_layers() if self._strategy.scored else None
        if selection.is_automatic:
            return tuple(range(self._num_layers)), scores
        ratio = 1.0 if selection.ratio == "auto" else selection.ratio  # of a strategy that does not use it
        return self._choose(ratio, scores), scores

    def after_warm_up(self, state: RunState) -> tuple[tuple[int, ...], float]:
        """The layers from now on, and the lossless ratio by which they are so many."""
        last = state.server.round - 1
        command = Command(op=Op.RATIO, round=last, layers=state.layers, payload=state.server.params)
        counts = self._shares(sample_devices(self._config, last))
        records = self._exchange.request(command, messages.ratio_record(), counts)
        records = records[np.argsort(records["device"])]
        by = self._config.selection.auto_by
        ratio = global_ratio(records["ratio"], records["num_examples"], by)
        layers = self._choose(max(ratio, 1 / self._num_layers), state.scores)
        log.info("lossless ratio by %s, %s", by, "; ".join(map(partial(describe_ratio, by), records)))
        words = describe_spread(by, records["ratio"])
        log.info("lossless ratio %.3f (%s): exchanging layers %s", ratio, words, list(layers))
        return layers, ratio

    def _score_layers(self) -> NDArray[np.float64]:
        """Global layer scores [L] from one batch of every device that can train; see `fedhpc.selection.strategies`."""
        counts = self._shares(training_devices(self._config))
        records = self._exchange.request(Command(op=Op.SCORE), messages.score_record(self._num_layers), counts)
        records = records[np.argsort(records["device"])]
        return global_scores(records["scores"], records["num_examples"])

    def _choose(self, ratio: float, scores: NDArray[np.float64] | None) -> tuple[int, ...]:
        strategy, num_layers = self._strategy, self._num_layers
        if scores is not None:
            alike = strategy.undecided_layers(ratio=ratio, num_layers=num_layers, scores=scores)
            if alike:
                log.warning("%s", strategy.describe_tie(alike, scores))
        return strategy.choose(ratio=ratio, num_layers=num_layers, seed=self._config.seed, scores=scores)

    def _shares(self, devices: Iterable[int]) -> list[int]:
        """How many of the devices are in each worker's share of work that needs no state."""
        workers = self._exchange.num_workers
        return [int(count) for count in np.bincount([device % workers for device in devices], minlength=workers)]
