"""The classes that a model predicts for the examples of a split."""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedhpc.data.prepared import Split
from fedhpc.model.backbone import Backbone
from fedhpc.seeding import generator
from fedhpc.tuning import Tuning
from fedhpc.tuning.base import as_parameters


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
    order = examples[np.argsort(np.asarray(split.lengths)[examples], kind="stable")]
    for first in range(0, len(order), batch_size):
        yield order[first : first + batch_size]


@torch.no_grad()
def class_scores(
    backbone: Backbone,
    tuning: Tuning,
    tensors: dict[str, np.ndarray],
    split: Split,
    batches: Iterator[NDArray[np.int64]],
) -> Iterator[tuple[NDArray[np.int64], Tensor]]:
    """Each batch's examples [b] and their class scores [b, C]."""
    params = as_parameters(tensors, backbone.torch_device)
    backbone.training_mode(False)
    for examples in batches:
        yield examples, tuning.forward(backbone, [params], split.batch(examples).to(backbone.torch_device))
