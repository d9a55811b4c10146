"""Answers in writing on the devices' side: the server's, and those of devices that have layers of their own."""

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from fedhpc.checkpoint.device_state import DeviceState
from fedhpc.config import Config
from fedhpc.data.prepared import Batch, PreparedData
from fedhpc.device.loans import lend
from fedhpc.device.round_context import RoundContext
from fedhpc.evaluate.predictions import DeviceBatch, results
from fedhpc.evaluate.questions import SERVER, Questions, answer_dtype, make_decoding
from fedhpc.exchange import Exchange
from fedhpc.federation.partition import Partition
from fedhpc.federation.sampling import Homes, sampled_before
from fedhpc.model.backbone import Backbone
from fedhpc.model.decoding import decode
from fedhpc.model.pretrained import load_tokenizer
from fedhpc.tuning import Tuning
from fedhpc.tuning.base import Params, as_parameters


class Answering:
    """A worker's part of the answers."""

    def __init__(
        self,
        config: Config,
        data: PreparedData,
        partition: Partition,
        backbone: Backbone,
        tuning: Tuning,
        exchange: Exchange,
    ) -> None:
        self.config, self.backbone, self.tuning, self.exchange = config, backbone, tuning, exchange
        split, evaluate = data.split("validation"), config.evaluate
        self.questions = Questions(split, partition.validation, count=evaluate.generate, seed=config.seed)
        self.decoding = make_decoding(evaluate, split, load_tokenizer(config.model.name), config.seed)

    def records(
        self,
        context: RoundContext,
        unseen: DeviceState,
        states: Mapping[int, DeviceState] | None,
        homes: Homes,
        worker: int,
    ) -> np.ndarray:
        """This worker's answers, each an `answer_dtype`; arguments as those of `Evaluation.record`."""
        sampled = set() if states is None else sampled_before(self.config, context.round)
        of_worker: list[list[DeviceBatch]] = [
            self.questions.batches(
                self.config.evaluate.batch_size,
                each,
                homes.num_workers,
                sampled,
                side_by_side=self.tuning.packable,
            )
            for each in range(homes.num_workers)
        ]
        placed = [(batch, each) for each, batches in enumerate(of_worker) for batch in batches]
        own = {} if states is None else lend(placed, states, homes, worker, self.exchange)

        def params_of(device: int) -> Params:
            local = unseen.local if device == SERVER else own.get(device, unseen.local)
            return as_parameters(self.tuning.merge(context.params, local, context.layers), self.backbone.torch_device)

        mine = of_worker[worker]
        records = np.zeros(
            sum(len(part) for batch in mine for _, part in batch), answer_dtype(self.decoding.max_new_tokens)
        )
        place = 0
        for batch in mine:
            pairs = [(params_of(device), part) for device, part in batch]
            asked = np.concatenate([part for _, part in batch])
            answer = partial(self._answers, examples=self.questions.examples[asked].tolist())
            for _, answers in results(answer, self.backbone, self.questions.prompts, [pairs]):
                for question, tokens in zip(asked, answers, strict=True):
                    record = records[place]
                    record["question"], record["personal"] = question, batch[0][0] != SERVER
                    record["length"], record["tokens"][: len(tokens)] = len(tokens), tokens
                    place += 1
        return records

    def _answers(self, params: Sequence[Params], batch: Batch, examples: Sequence[int]) -> list[list[int]]:
        overlay = self.tuning.overlay(self.backbone, params, batch, None)
        beat = partial(self.exchange.beat, "generating")
        return decode(self.backbone, overlay, batch, self.decoding, examples, beat=beat)
