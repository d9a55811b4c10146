"""The last layer at the answer slots alone: no other of its outputs is read.

Keys and values come from every position; query, output projection and feed-forward from one position of each text. The
layer runs twice: the first pass ends as soon as keys and values are known, the second has the slots as its only input.

Shapes: b examples, s positions, T prompt tokens, H hidden size.
"""

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from fedhpc.model.rows import Rows, mask_at


class Known(Exception):  # noqa: N818 - not an error
    """Ends a layer's first pass."""


class Memory:
    """What the first pass leaves to the second."""

    def __init__(self, slots: Tensor, rows: Rows | None) -> None:
        self.slots, self._rows = slots, rows
        self.known: tuple[Any, Any, Any] | None = None
        """Keys and values [b, heads, T + s, head_dim], and the slots' rows [b, 1, 1, T + s] of the mask; of texts one
        behind the other three lists, by group."""

    def keep(self, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
        """Note the first pass's keys, values and mask [b, 1, s, T + s], and end it."""
        self.known = key, value, mask if mask is None else mask_at(self.slots, mask.expand(len(key), -1, -1, -1))
        raise Known

    def keep_groups(self, keys: list[Tensor], values: list[Tensor], masks: list[Tensor | None]) -> None:
        """The same of `fedhpc.model.rows`, with the slots' rows of each group's mask."""
        self.known = keys, values, masks
        raise Known

    def at_slots(self, tensor: Tensor) -> Tensor:
        """[b, s, ...] at the slots: [b, 1, ...]; or [1, n, ...] and [1, b, ...], of texts one behind the other."""
        slots = self.slots.to(tensor.device)
        if self._rows is not None:
            return tensor.index_select(1, self._rows.at(slots))
        return tensor[torch.arange(len(slots), device=tensor.device), slots].unsqueeze(1)

    # Not a closure that calls itself: a cycle of references would keep keys, values and the graph behind them alive
    # until the garbage collector comes by.
    def narrow(self, value: Any, size: tuple[int, ...]) -> Any:
        """What a layer is given for [b, s] positions, at the slots alone.

        That concerns tensors [b or 1, s] and [b or 1, s, ...], also within tuples; all else stays as it is.
        """
        if isinstance(value, tuple):
            return tuple(self.narrow(each, size) for each in value)
        if isinstance(value, Tensor) and value.dim() in (2, 3) and value.shape[1] == size[1]:
            return self.at_slots(value.expand(size[0], *value.shape[1:]))
        return value


class LastLayer:
    """Takes the place of a layer's forward; a pass that carries `slots` [b] has outputs [b, 1, H], or [1, b, H]."""

    def __init__(self, layer: nn.Module) -> None:
        self._layer, self._forward = layer, layer.forward
        layer.forward = self._at_slots

    def restore(self) -> None:
        """Let the layer be as it was."""
        self._layer.forward = self._forward

    def _at_slots(
        self, hidden: Tensor, *args: Any, slots: Tensor | None = None, rows: Rows | None = None, **kwargs: Any
    ) -> Any:
        kwargs |= {} if rows is None else {"rows": rows}
        if slots is None:
            return self._forward(hidden, *args, **kwargs)
        memory, size = Memory(slots, rows), hidden.shape[:2]
        with suppress(Known):
            self._forward(hidden, *args, memory=memory, **kwargs)
        named = {name: memory.narrow(value, size) for name, value in kwargs.items()}
        positional = [memory.narrow(value, size) for value in (hidden, *args)]
        return self._forward(*positional, memory=memory, **named)
