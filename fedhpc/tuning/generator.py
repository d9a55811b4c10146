"""A network that makes soft tokens from a text's representation: one hidden layer, W_2 tanh(W_1 h + b_1) + b_2.

Shapes: b examples, H hidden size, m bottleneck, T tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from fedhpc.config import TuningConfig
from fedhpc.overlay import each_device
from fedhpc.pretrained import BackboneShape
from fedhpc.tuning.base import Params


def generator_shapes(config: TuningConfig, shape: BackboneShape) -> dict[str, tuple[int, ...]]:
    """Its trainable tensors."""
    width, m = shape.hidden_size, config.bottleneck
    return {
        "generator.down": (m, width),
        "generator.down.bias": (m,),
        "generator.up": (config.num_tokens * width, m),
        "generator.up.bias": (config.num_tokens * width,),
    }


def generate(params: Sequence[Params], representation: Tensor, sizes: Sequence[int]) -> Tensor:
    """Tokens [b, T, H] from representations [b, H], each device's by its own network."""

    def network(place: int, h: Tensor) -> Tensor:
        own = params[place]
        inner = torch.tanh(
            functional.linear(h.to(own["generator.down"]), own["generator.down"], own["generator.down.bias"])
        )
        return functional.linear(inner, own["generator.up"], own["generator.up.bias"])

    return each_device(network, representation, sizes).unflatten(1, (-1, representation.shape[1]))
