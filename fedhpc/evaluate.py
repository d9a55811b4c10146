"""Accuracy as counts: confusion matrices that add up exactly, whatever the number of ranks."""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from fedhpc.data import Split
from fedhpc.metrics import confusion
from fedhpc.models import Backbone
from fedhpc.tuning import Tuning
from fedhpc.tuning.base import as_parameters


def evaluation_batches(split: Split, examples: NDArray[np.int64], batch_size: int) -> Iterator[NDArray[np.int64]]:
    """The examples in batches of similar length, in an order that depends on nothing but the data."""
    order = examples[np.argsort(np.asarray(split.lengths)[examples], kind="stable")]
    for first in range(0, len(order), batch_size):
        yield order[first : first + batch_size]


@torch.no_grad()
def evaluate(
    backbone: Backbone,
    tuning: Tuning,
    tensors: dict[str, np.ndarray],
    split: Split,
    batches: Iterator[NDArray[np.int64]],
    num_classes: int,
) -> NDArray[np.int64]:
    """Confusion matrix [C, C] of the batches' examples."""
    params = as_parameters(tensors, backbone.torch_device)
    backbone.training_mode(False)
    total = np.zeros((num_classes, num_classes), np.int64)
    for batch_examples in batches:
        batch = split.batch(batch_examples).to(backbone.torch_device)
        predictions = tuning.forward(backbone, [params], batch).argmax(1)
        total += confusion(batch.labels.cpu().numpy(), predictions.cpu().numpy(), num_classes)
    return total
