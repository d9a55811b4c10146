"""Which examples of a split a model answers in writing, in which batches, and how its answers cross ranks."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedhpc.config.sections import EvaluateConfig
from fedhpc.data.prepared import Batch, Description, Split
from fedhpc.errors import ConfigError
from fedhpc.evaluate.predictions import SERVER, DeviceBatch, device_batches, evaluation_batches, evaluation_examples
from fedhpc.model.backbone import Backbone
from fedhpc.model.decoding import Decoding, decode
from fedhpc.registry import GENERATION_METRICS
from fedhpc.tuning import Tuning
from fedhpc.tuning.base import Params


class Questions:
    """Different prompts of a split, each category its share; ascending, the same at every evaluation.

    Args:
        split: of texts to be generated.
        of_device: examples of each device; those of none are not asked.
        count: so many, or all there are.
        seed: of the run.
    """

    def __init__(self, split: Split, of_device: Sequence[NDArray[np.int64]], *, count: int, seed: int) -> None:
        assert split.spans is not None
        owners = np.full(len(split), SERVER)
        for device, own in enumerate(of_device):
            owners[own] = device
        sharing: dict[bytes, list[int]] = {}
        for example in np.flatnonzero(owners != SERVER).tolist():
            sharing.setdefault(prompt_of(split, example).tobytes(), []).append(example)
        groups = list(sharing.values())
        firsts = np.array([group[0] for group in groups], np.int64)
        chosen = evaluation_examples(split.labels[firsts], count, seed)
        self.examples: NDArray[np.int64] = firsts[chosen]
        """Of those that share the prompt, the first [n]."""
        self.sharing = [groups[index] for index in chosen]
        """All that do: each has a reference."""
        self.devices = owners[self.examples]
        """Whose the first is [n]."""
        self.prompts = question_split(
            [prompt_of(split, example) for example in self.examples],
            [split.spans_of(example)[:-1].ravel() for example in self.examples],
            pad_id=split.pad_id,
        )
        """n examples without their last answers."""

    def __len__(self) -> int:
        return len(self.examples)

    def batches(self, batch_size: int, sampled: Collection[int], *, side_by_side: bool) -> list[DeviceBatch]:
        """What is answered together: everything by the server, then each device's own; in turn on each worker.

        Args:
            sampled: devices that have layers of their own, and answer their prompts once more.
            side_by_side: whether devices may share a batch.
        """
        everything = np.arange(len(self))
        shares = {device: np.flatnonzero(self.devices == device) for device in sorted(sampled)}
        batches: list[DeviceBatch] = [
            [(SERVER, part)] for part in evaluation_batches(self.prompts, everything, batch_size)
        ]
        return batches + device_batches(self.prompts, shares, batch_size, side_by_side=side_by_side)


def prompt_of(split: Split, example: int) -> NDArray[np.int32]:
    """The tokens before an example's last answer."""
    begin, end = split.offsets[example], split.spans_of(example)[-1][0]
    return np.asarray(split.tokens[begin : begin + end])


def answer_of(split: Split, example: int) -> NDArray[np.int32]:
    """The tokens of an example's last answer."""
    begin, end = split.spans_of(example)[-1] + split.offsets[example]
    return np.asarray(split.tokens[begin:end])


def question_split(texts: Sequence[NDArray[np.int32]], earlier: Sequence[NDArray[np.int64]], *, pad_id: int) -> Split:
    """A split of prompts.

    Args:
        texts: tokens of each.
        earlier: begin and end of each answer that a prompt has in it already [2 k].
    """
    offsets = np.cumsum([0, *map(len, texts)])
    return Split(
        tokens=np.concatenate(texts),
        offsets=offsets,
        labels=np.zeros(len(texts), np.int32),
        slots=np.diff(offsets) - 1,
        pad_id=pad_id,
        spans=np.concatenate([own + start for own, start in zip(earlier, offsets, strict=False)]),
    )


def end_tokens(split: Split, tokenizer: Any) -> tuple[int, ...]:
    """What ends an answer: the tokenizer's end token, and a special token that most answers of a split end with.

    That is a chat template's end of a turn.
    """
    assert split.spans is not None
    tokens, counts = np.unique(split.tokens[split.spans[1::2] - 1], return_counts=True)
    usual = int(tokens[counts.argmax()])
    known = tokenizer.added_tokens_decoder
    is_special = usual in known and known[usual].special
    return tuple(sorted({tokenizer.eos_token_id} - {None} | ({usual} if is_special else set())))


def make_decoding(config: EvaluateConfig, split: Split, tokenizer: Any, seed: int) -> Decoding:
    """How prompts are answered, as a configuration says."""
    return Decoding(
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        ends=end_tokens(split, tokenizer),
        pad_id=split.pad_id,
        seed=seed,
    )


def answer_tokens(
    backbone: Backbone,
    tuning: Tuning,
    how: Decoding,
    examples: Sequence[int],
    params: Sequence[Params],
    batch: Batch,
    **watch: Any,
) -> list[list[int]]:
    """The answer to each prompt of a batch, with the trainable tensors of its devices; see `decode`."""
    return decode(backbone, tuning.overlay(backbone, params, batch, None), batch, how, examples, **watch)


def answer_dtype(max_new_tokens: int) -> np.dtype:
    """An answer on its way to the server: which question's, by whom, and its tokens."""
    return np.dtype([("question", "<i4"), ("personal", "<i4"), ("length", "<i4"), ("tokens", "<i4", (max_new_tokens,))])


def check_task(description: Description) -> None:
    """ConfigError where texts of a task cannot be answered and compared."""
    if description.head != "language_model":
        raise ConfigError(
            f"evaluate.generate: data.path was prepared for classification ({description.task}), where nothing is "
            "generated; set evaluate.generate: 0"
        )
    metrics, form = description.generation["metrics"], description.generation["format"]
    if form == "text":
        raise ConfigError(
            f"evaluate.generate: task {description.task} has whole texts (format: text), no prompts; set "
            "evaluate.generate: 0"
        )
    for name in metrics:
        if name not in GENERATION_METRICS:
            raise ConfigError(
                f"evaluate.generate: task {description.task} names the metric {name}, which no plug-in has registered "
                f"here; name its module under plugins:, or prepare for some of {', '.join(GENERATION_METRICS)}"
            )
        GENERATION_METRICS[name].check()
