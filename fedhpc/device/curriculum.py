"""A curriculum: batches from easy to hard, by the Fisher information that a device's examples carry.

FibecFed: Fisher Information-based Efficient Curriculum Federated Learning with Large Language Models. Liu, Ren, Jin,
Zhang, Zhou, Valduriez, Dou. EMNLP 2024. https://arxiv.org/abs/2410.00131.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from fedhpc.data.prepared import Split
from fedhpc.model.backbone import Backbone
from fedhpc.tuning import Tuning
from fedhpc.tuning.base import Params, as_parameters

Batches = list[NDArray[np.int64]]


def easy_first(batches: Batches, traces: NDArray[np.float64]) -> Batches:
    """The batches by rising trace, ties in the given order."""
    return [batches[place] for place in np.argsort(traces, kind="stable")]


def some_of(plan: Batches, count: int, rng: np.random.Generator) -> Batches:
    """So many of a round's batches, in their order: the first ones would be the same easy ones in every round."""
    return [plan[place] for place in np.sort(rng.choice(len(plan), count, replace=False))]


def fisher_traces(
    backbone: Backbone,
    tuning: Tuning,
    tensors: dict[str, np.ndarray],
    split: Split,
    batches: Batches,
    beat: Callable[[str], None],
) -> NDArray[np.float64]:
    """How hard each batch is: the trace of its empirical Fisher information.

    Args:
        tensors: all trainable tensors before round 0.
        beat: called before every batch.
    """
    backbone.training_mode(True, dropout=False)
    params, traces = as_parameters(tensors, backbone.torch_device), np.empty(len(batches))
    for place, batch in enumerate(batches):
        beat("measuring how hard batches are")
        traces[place] = fisher_trace(backbone, tuning, params, split, batch)
    return traces


def fisher_trace(
    backbone: Backbone,
    tuning: Tuning,
    params: Params,
    split: Split,
    examples: NDArray[np.int64],
) -> float:
    """Mean over the examples of the squared gradient of the log-likelihood, summed over all trainable parameters.

    Where devices can be packed, every example counts as a device: one pass gives each its own gradient.
    """
    groups = [examples] if tuning.packable else np.split(examples, len(examples))
    squares = [_squared_gradients(backbone, tuning, params, split, group) for group in groups]
    return sum(squares) / len(examples)


def _squared_gradients(
    backbone: Backbone, tuning: Tuning, params: Params, split: Split, examples: NDArray[np.int64]
) -> float:
    batch = split.batch(examples, [1] * len(examples)).to(backbone.torch_device)
    each = [{name: tensor.detach().clone().requires_grad_() for name, tensor in params.items()} for _ in examples]
    losses = tuning.loss_terms(backbone, each, batch)
    gradients = backbone.gradients(losses.sum(), [tensor for own in each for tensor in own.values()])
    return float(sum(gradient.double().square().sum() for gradient in gradients))
