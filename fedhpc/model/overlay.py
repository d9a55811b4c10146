"""What a tuning lays over a frozen backbone in one forward pass.

Shapes: N devices, b examples, s positions, L layers, T soft tokens or prompt tokens, D key width, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedhpc.job.deferred import Tensor, nn, torch

Edit = Callable[[int, Tensor, Tensor, Sequence[int]], Tensor]
"""A module's output [r, out] from its layer's index, its input [r, in], what it put out by itself [r, out], and how
many of the r rows belong to each device; a row is a token, or a text."""


@dataclass(frozen=True, kw_only=True)
class SoftTokens:
    """Tokens put before the texts where ``layer`` begins; layers below do not see them."""

    count: int
    """T."""
    layer: int
    """0: before the word embeddings; positions and normalisation are then added as to words."""
    make: Callable[[Tensor, Tensor], Tensor]
    """Tokens [b, T, H] from the texts' hidden states there [b, s, H] and which of these it may read [b, s, 1]: those
    of the text, or of one that is to be generated those of its prompt."""


@dataclass(frozen=True, kw_only=True)
class Overlay:
    """Nothing, unless something is given."""

    prompts: Sequence[Tensor] | None = None
    """Of each layer keys and values before those of the texts [N, 2, T, D]."""
    first_position: int = 0
    """Position of the texts' first token."""
    tokens: SoftTokens | None = None
    edits: Mapping[str, Edit] = field(default_factory=dict)
    """Path of a module within a layer -> what becomes of its output."""
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    """Parameters of the backbone, by path, to be used in place of its own."""


class Hooks:
    """The places in a backbone's layers where an overlay acts.

    They stay as the last forward pass set them: gradient checkpointing computes layers again in the backward pass.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self._layers = layers
        self._edits: Mapping[str, Edit] = {}
        self._sizes: Callable[[int], Sequence[int]] | None = None
        self._hooked: set[str] = set()
        self._enter: tuple[int, Callable[[Tensor], Tensor]] | None = None
        for index, layer in enumerate(layers):
            layer.register_forward_pre_hook(self._before(index))

    def set(
        self,
        edits: Mapping[str, Edit],
        sizes: Callable[[int], Sequence[int]],
        enter: tuple[int, Callable[[Tensor], Tensor]] | None,
    ) -> None:
        """Change modules' outputs, and the hidden states that enter one layer, from now on.

        Args:
            sizes: how many of so many rows belong to each device.
        """
        for path in sorted(edits.keys() - self._hooked):
            for index, layer in enumerate(self._layers):
                layer.get_submodule(path).register_forward_hook(self._after(path, index))
            self._hooked.add(path)
        self._edits, self._sizes, self._enter = edits, sizes, enter

    def _before(self, index: int) -> Callable[[nn.Module, tuple[Any, ...]], Any]:
        def change(_module: nn.Module, inputs: tuple[Any, ...]) -> Any:
            if self._enter is None or self._enter[0] != index:
                return None
            return (self._enter[1](inputs[0]), *inputs[1:])

        return change

    def _after(self, path: str, index: int) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor | None]:
        def change(_module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
            edit = self._edits.get(path)
            if edit is None or self._sizes is None:
                return None
            rows = output.flatten(0, -2)
            return edit(index, inputs[0].flatten(0, -2), rows, self._sizes(len(rows))).view_as(output)

        return change


def each_device(function: Callable[[int, Tensor], Tensor], tensor: Tensor, sizes: Sequence[int]) -> Tensor:
    """``function(device's place, its rows)`` for every device with rows in ``tensor`` [r, ...]; ``sizes``: how many."""
    if len(sizes) == 1:
        return function(0, tensor)
    parts = tensor.split(list(sizes))
    return torch.cat([function(place, part) for place, part in enumerate(parts)])


def rows_of_devices(each: Sequence[Tensor] | Tensor, sizes: Sequence[int]) -> Tensor:
    """A tensor [r, ...] with every device's own tensor [...] for each of its rows; ``sizes``: how many it has."""
    parts = [own.expand(size, *own.shape) for own, size in zip(each, sizes, strict=True)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def with_tokens(mask: Tensor, count: int, *, visible: bool, causal: bool) -> Tensor:
    """An attention mask [b, 1, T + s, T + s] from that of the texts [b, s] or [b, 1, s, s].

    Args:
        count: T; the tokens see each other.
        visible: whether the texts see them.
        causal: whether a position of mask [b, s] sees only what is before it.
    """
    b, s = mask.shape[0], mask.shape[-1]
    if mask.dim() == 2:
        mask = mask.bool()[:, None, None, :].expand(b, 1, s, s)
        mask = mask.tril() if causal else mask
    whole = torch.zeros(b, 1, count + s, count + s, dtype=torch.bool, device=mask.device)
    whole[..., count:, count:] = mask
    whole[..., count:, :count] = visible
    whole[..., :count, :count] = torch.ones_like(whole[..., :count, :count]).tril() if causal else True
    if not causal:
        whole[..., :count, count:] = mask[..., :1, :]
    return whole
