"""What server methods share that look at the factors of LoRA: a change of low rank is B A, and A and B are exchanged.

Shapes: L exchanged layers, r rank.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from fedhpc.errors import ConfigError
from fedhpc.methods.base import Method, ServerState, f32, weighted_mean
from fedhpc.methods.updates import Layout, RoundUploads, Vector
from fedhpc.registry import TUNINGS


class FactorMethod(Method):
    """P^{t+1} is the mean of the uploads but for what a subclass makes of the factors in `update`."""

    @classmethod
    def check(cls, config: Any) -> None:
        """See `Method`; it needs both factors."""
        super().check(config)
        method, tuning = config.server.method, config.parts["tuning"]
        if not tuning.has_factors:
            valid = ", ".join(name for name, part in TUNINGS.items() if part.has_factors)
            raise ConfigError(
                f"server.method: {method} needs the factors A and B of changes of low rank, which tuning.kind: "
                f"{config.tuning.kind} does not exchange; valid: {valid}"
            )
        if config.exchange.keep:
            raise ConfigError(f"server.method: {method} needs exchange.keep: []")

    def init(self, params: Vector) -> ServerState:
        """No state but the parameters."""
        return ServerState(round=0, params=params)

    def step(self, state: ServerState, uploads: RoundUploads) -> ServerState:
        """The mean of every element."""
        mean = weighted_mean(uploads.in_device_order())
        return replace(state, round=state.round + 1, params=f32(mean))


def factors(layout: Layout) -> Iterator[tuple[str, str]]:
    """The names of A [L, r, in] and B [L, out, r] of every changed module."""
    for name in layout.shapes:
        if name.startswith("lora_A."):
            yield name, name.replace("lora_A.", "lora_B.", 1)
