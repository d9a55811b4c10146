"""A network that makes soft tokens from a text's representation: one hidden layer, W_2 tanh(W_1 h + b_1) + b_2.

Shapes: b examples, m bottleneck, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedhpc.config.sections import Positive
from fedhpc.job.deferred import Tensor, functional, torch
from fedhpc.model.overlay import each_device
from fedhpc.tuning.base import Params, TokensConfig


class GeneratorConfig(TokensConfig):
    """Of tunings with such a network."""

    bottleneck: Positive = 32
    """Width of the small network."""


def generator_shapes(config: GeneratorConfig, *, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    """Its trainable tensors, for representations and tokens of these widths."""
    m = config.bottleneck
    return {
        "generator.down": (m, inputs),
        "generator.down.bias": (m,),
        "generator.up": (config.num_tokens * outputs, m),
        "generator.up.bias": (config.num_tokens * outputs,),
    }


def generate(params: Sequence[Params], representation: Tensor, sizes: Sequence[int], num_tokens: int) -> Tensor:
    """Tokens [b, T, outputs] from representations [b, inputs], each device's by its own network."""

    def network(place: int, h: Tensor) -> Tensor:
        own = params[place]
        inner = torch.tanh(
            functional.linear(h.to(own["generator.down"]), own["generator.down"], own["generator.down.bias"])
        )
        return functional.linear(inner, own["generator.up"], own["generator.up.bias"])

    return each_device(network, representation, sizes).unflatten(1, (num_tokens, -1))
