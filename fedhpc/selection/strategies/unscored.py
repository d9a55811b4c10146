"""Strategies that need no look at the data."""

from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedhpc.config.sections import SelectionConfig
from fedhpc.errors import ConfigError
from fedhpc.registry import STRATEGIES
from fedhpc.seeding import generator
from fedhpc.selection.strategy import Strategy


@STRATEGIES.register("random")
class Random(Strategy):
    """Layers at random, by the run's seed."""

    def rank(self, num_layers: int, seed: int, scores: NDArray[np.float64] | None) -> Sequence[int]:
        """See `Strategy`."""
        return [int(layer) for layer in generator(seed, purpose="random layers").permutation(num_layers)]


@STRATEGIES.register("first")
class First(Strategy):
    """The layers next to the input."""

    def rank(self, num_layers: int, seed: int, scores: NDArray[np.float64] | None) -> Sequence[int]:
        """See `Strategy`."""
        return range(num_layers)


@STRATEGIES.register("last")
class Last(Strategy):
    """The layers next to the output."""

    def rank(self, num_layers: int, seed: int, scores: NDArray[np.float64] | None) -> Sequence[int]:
        """See `Strategy`."""
        return range(num_layers)[::-1]


@STRATEGIES.register("all")
class All(Strategy):
    """Every layer."""

    needs_layers = False
    uses_ratio = False

    def num_exchanged(self, num_layers: int) -> int:
        """See `Strategy`."""
        return num_layers

    def choose(
        self, *, ratio: float, num_layers: int, seed: int, scores: NDArray[np.float64] | None
    ) -> tuple[int, ...]:
        """See `Strategy`."""
        return tuple(range(num_layers))


@STRATEGIES.register("explicit")
class Explicit(Strategy):
    """The layers that the configuration lists."""

    class Config(SelectionConfig):
        """Keys."""

        layers: list[Annotated[int, Field(ge=0)]] | None = None
        """The layers, counted from 0."""

    exclusive = ("layers",)
    uses_ratio = False

    @classmethod
    def check(cls, config: Any) -> None:
        """See `fedhpc.config.sections.Part.check`."""
        layers = config.selection.layers
        if layers is None:
            raise ConfigError("selection.layers and selection.strategy: explicit go together")
        if not layers or len(set(layers)) != len(layers):
            raise ConfigError(f"selection.layers must name at least one layer, each once; found {layers}")

    def check_layers(self, num_layers: int) -> None:
        """See `Strategy`."""
        super().check_layers(num_layers)
        if outside := [layer for layer in self.config.layers if layer >= num_layers]:
            raise ConfigError(f"selection.layers: {outside} not in the backbone; valid: 0 to {num_layers - 1}")

    def num_exchanged(self, num_layers: int) -> int:
        """See `Strategy`."""
        return len(self.config.layers)

    def choose(
        self, *, ratio: float, num_layers: int, seed: int, scores: NDArray[np.float64] | None
    ) -> tuple[int, ...]:
        """See `Strategy`."""
        return tuple(sorted(self.config.layers))
