"""The classes that a model predicts for the examples of a split."""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedhpc.data import Split
from fedhpc.models import Backbone
from fedhpc.tuning import Tuning
from fedhpc.tuning.base import as_parameters


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
