"""The classes that a model predicts for the examples of a split."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedhpc.data.prepared import Batch, Split
from fedhpc.model.backbone import Backbone
from fedhpc.seeding import generator
from fedhpc.tuning import Tuning
from fedhpc.tuning.base import Params

Result = TypeVar("Result")
SERVER = -1
"""Stands in place of a device."""
DeviceBatch = list[tuple[int, NDArray[np.int64]]]
"""Devices, and the examples of each."""


def evaluation_examples(labels: NDArray[np.integer], count: int | None, seed: int) -> NDArray[np.int64]:
    """So many examples of a split, ascending, of each class its share; all for None or where there are no more.

    The shares are rounded down; those that lost most by it have one more, the lower class first among equals.
    """
    if count is None or count >= len(labels):
        return np.arange(len(labels))
    shares = np.bincount(labels) * count / len(labels)
    sizes = shares.astype(np.int64)
    sizes[np.argsort(sizes - shares, kind="stable")[: count - sizes.sum()]] += 1
    order = generator(seed, purpose="evaluation examples").permutation(len(labels))
    of_class = (order[labels[order] == number] for number in range(len(sizes)))
    return np.sort(np.concatenate([own[:size] for own, size in zip(of_class, sizes, strict=True)]))


def evaluation_batches(split: Split, examples: NDArray[np.int64], batch_size: int) -> Iterator[NDArray[np.int64]]:
    """The examples in batches of similar length, in an order that depends on nothing but the data."""
    order = _by_length(split, examples)
    for first in range(0, len(order), batch_size):
        yield order[first : first + batch_size]


def device_batches(
    split: Split, shares: Mapping[int, NDArray[np.int64]], batch_size: int, *, side_by_side: bool
) -> list[DeviceBatch]:
    """Batches of several devices' own examples.

    A batch that a device does not fill goes on with the next device: small ones cost more for each example. The rule
    does not know the ranks: what is computed together must not depend on their number.

    Args:
        shares: examples of each device.
        side_by_side: whether devices may share a batch.
    """
    batches: list[DeviceBatch] = []
    room = 0
    for device, examples in shares.items():
        own = _by_length(split, examples)
        while len(own):
            if not room:
                batches.append([])
                room = batch_size
            part, own = own[:room], own[room:]
            batches[-1].append((device, part))
            room -= len(part)
        if not side_by_side:
            room = 0
    return batches


@torch.no_grad()
def results(
    of_batch: Callable[[Sequence[Params], Batch], Result],
    backbone: Backbone,
    split: Split,
    batches: Iterable[Sequence[tuple[Params, NDArray[np.int64]]]],
) -> Iterator[tuple[NDArray[np.int64], Result]]:
    """Each batch's examples [b], and what comes of them without gradients.

    Args:
        of_batch: is given the trainable tensors of a batch's devices, and the batch.
        batches: trainable tensors, and the examples that are computed with them.
    """

    def computed(batch: Sequence[tuple[Params, NDArray[np.int64]]]) -> tuple[NDArray[np.int64], Result]:
        params, parts = zip(*batch, strict=True)
        examples, sizes = np.concatenate(parts), [len(part) for part in parts]
        return examples, of_batch(params, split.batch(examples, sizes).to(backbone.torch_device))

    backbone.training_mode(False)
    yield from map(computed, batches)  # a loop's variables would hold one batch's tensors beside the next one's


def class_scores(
    backbone: Backbone,
    tuning: Tuning,
    split: Split,
    batches: Iterable[Sequence[tuple[Params, NDArray[np.int64]]]],
) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
    """Each batch's examples [b] and their class scores [b, C]; see `results`."""
    return results(partial(tuning.forward, backbone), backbone, split, batches)


def _by_length(split: Split, examples: NDArray[np.int64]) -> NDArray[np.int64]:
    return examples[np.argsort(np.asarray(split.lengths)[examples], kind="stable")]
