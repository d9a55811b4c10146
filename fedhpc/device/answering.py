"""Answers in writing on the devices' side: the server's, and those of devices that have layers of their own."""

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np

from fedhpc.checkpoint.device_state import DeviceState
from fedhpc.config import Config
from fedhpc.data.prepared import PreparedData
from fedhpc.device.loans import lend, params_by_device
from fedhpc.device.round_context import RoundContext
from fedhpc.evaluate.predictions import SERVER, DeviceBatch, results
from fedhpc.evaluate.questions import Questions, answer_dtype, answer_tokens, make_decoding
from fedhpc.exchange import Exchange
from fedhpc.federation.partition import Partition
from fedhpc.federation.sampling import Homes, sampled_before
from fedhpc.model.backbone import Backbone
from fedhpc.model.pretrained import load_tokenizer
from fedhpc.tuning import Tuning
from fedhpc.tuning.base import Params


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
        self.dtype = answer_dtype(evaluate.max_new_tokens)

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
        size = self.config.evaluate.batch_size
        batches = self.questions.batches(size, sampled, side_by_side=self.tuning.packable)
        placed = [(batch, place % homes.num_workers) for place, batch in enumerate(batches)]
        own = {} if states is None else lend(placed, states, homes, worker, self.exchange)
        params_of = params_by_device(context, unseen, own, self.tuning, self.backbone)
        parts = [self._records(batch, params_of) for batch, at in placed if at == worker]
        return np.concatenate([np.zeros(0, self.dtype), *parts])

    def _records(self, batch: DeviceBatch, params_of: Callable[[int], Params]) -> np.ndarray:
        asked = np.concatenate([part for _, part in batch])
        examples = self.questions.examples[asked].tolist()
        beat = partial(self.exchange.beat, "generating")
        answer = partial(answer_tokens, self.backbone, self.tuning, self.decoding, examples, beat=beat)
        pairs = [(params_of(device), part) for device, part in batch]
        records = np.zeros(len(asked), self.dtype)
        ((_, answers),) = results(answer, self.backbone, self.questions.prompts, [pairs])
        for record, question, tokens in zip(records, asked, answers, strict=True):
            record["question"], record["personal"] = question, batch[0][0] != SERVER
            record["length"], record["tokens"][: len(tokens)] = len(tokens), tokens
        return records
