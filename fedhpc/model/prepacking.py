"""Frozen weights of linear modules in the order in which a CPU's matrix instructions read them: oneDNN's blocks.

Without that, every product puts them in order anew. https://uxlfoundation.github.io/oneDNN/dev_guide_inner_product.html
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D


class _Linear(torch.autograd.Function):
    """x W^T + bias of x [n, in], with W [out, in] and W^T prepacked, which are constants.

    Its gradient is the same function with the two weights exchanged, and so can be differentiated again.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, transposed: Tensor, bias: Tensor | None) -> Tensor:
        ctx.exchanged = transposed, weight
        outputs: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")
        return outputs

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _Linear.apply(gradient.contiguous(), *ctx.exchanged, None), None, None, None


def prepack(model: nn.Module) -> int:
    """Have the linear modules of a model's layers compute with prepacked weights; how many modules those are.

    Raises:
        RuntimeError, AttributeError: PyTorch cannot do so here.
    """
    found = _linears(model)
    for module in found:
        _prepack(module)
    return len(found)


def prepacked_bytes(model: nn.Module) -> int:
    """What the prepacked weights take beside the weights themselves."""
    return sum(2 * module.weight.nbytes for module in _linears(model))


def _prepack(module: Any) -> None:
    weight, bias = module.weight.detach(), module.bias
    if isinstance(module, Conv1D):
        weight = weight.T
    both = [torch.ops.mkldnn._reorder_linear_weight(each.contiguous(), None) for each in (weight, weight.T)]

    def forward(inputs: Tensor) -> Tensor:
        outputs: Tensor = _Linear.apply(inputs.flatten(0, -2), *both, bias)
        return outputs.unflatten(0, inputs.shape[:-1])

    module.forward = forward


def _linears(model: nn.Module) -> list[Any]:
    """The linear modules that compute as their class does; others may look at their weights."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    parts = dict.fromkeys(part for layer in layers for part in layer.modules())
    return [part for part in parts if type(part) in (nn.Linear, Conv1D)]
