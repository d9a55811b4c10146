"""Frozen weights of linear modules in the order in which a CPU's matrix instructions read them: oneDNN's blocks.

Without that, every product puts them in order anew. https://uxlfoundation.github.io/oneDNN/dev_guide_matmul.html
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D


class _Linear(torch.autograd.Function):
    """x W^T + bias, of W [out, in] and W^T prepacked; the gradient's gradient is one, too."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, transposed: Tensor, bias: Tensor | None) -> Tensor:
        ctx.both = transposed, weight
        return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _Linear.apply(gradient.contiguous(), *ctx.both, None), None, None, None


def prepack(model: nn.Module) -> None:
    """Have the linear modules of a model's layers compute with prepacked weights.

    Raises:
        RuntimeError, AttributeError: PyTorch cannot do so here.
    """
    for module in _linears(model):
        _prepack(module)


def prepacked_bytes(model: nn.Module) -> int:
    """What the prepacked weights take beside the weights themselves."""
    return sum(2 * module.weight.nbytes for module in _linears(model))


def _prepack(module: Any) -> None:
    weight, bias = module.weight.detach(), module.bias
    if isinstance(module, Conv1D):
        weight = weight.T
    both = [torch.ops.mkldnn._reorder_linear_weight(each.contiguous(), None) for each in (weight, weight.T)]
    module.forward = lambda inputs: _Linear.apply(inputs, *both, bias)


def _linears(model: nn.Module) -> Iterator[Any]:
    """The linear modules that compute as their class does; others may look at their weights."""
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            yield from (module for module in layer.modules() if type(module) in (nn.Linear, Conv1D))
