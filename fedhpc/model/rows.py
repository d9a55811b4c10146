"""Texts one behind the other in one row of tokens, so that no layer computes padding; attention takes them in groups.

Linear layers, norms and embeddings see a batch of one row, [1, n]. Only attention has to know where a text begins: it
puts texts of similar length side by side, each group padded to its longest.

Shapes: b texts, s columns of the padded batch, n tokens of all texts together, k texts of a group, l tokens of its
longest, T prompt tokens, H hidden size, m places of all groups together (k * l each).
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedhpc.model.overlay import rows_of_devices

CALL_COST = {"cpu": 2e5, "cuda": 2e8}
"""What one more call of attention costs, in hidden elements of pairs of tokens; only speed depends on it."""


class Places(NamedTuple):
    """Where the elements of one list are in a longer one, and where each of that comes from."""

    inside: Tensor
    """[short]"""
    origins: Tensor
    """[long]; anything where none is inside."""
    is_inside: Tensor | None
    """[long, 1, 1] of zeros and ones; None where both lists are of one length."""


class _Gather(torch.autograd.Function):
    """The elements [short, ...] inside of [long, ...]. Either direction is a selection: no sums, no sorting."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, places: Places) -> Tensor:
        ctx.places = places
        return tensor.index_select(0, places.inside)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _spread(gradient, ctx.places), None


class _Spread(torch.autograd.Function):
    """[long, ...] from the elements inside, zeros elsewhere."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, places: Places) -> Tensor:
        ctx.places = places
        spread = tensor.index_select(0, places.origins)
        if places.is_inside is not None:
            spread *= places.is_inside.view(-1, *[1] * (spread.dim() - 1))
        return spread

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _gather(gradient, ctx.places), None


def _gather(tensor: Tensor, places: Places) -> Tensor:
    result: Tensor = _Gather.apply(tensor, places)
    return result


def _spread(tensor: Tensor, places: Places) -> Tensor:
    result: Tensor = _Spread.apply(tensor, places)
    return result


class Group:
    """Texts whose attention is computed together."""

    def __init__(self, texts: NDArray[np.int64], lengths: NDArray[np.int64]) -> None:
        self.texts, self.lengths = texts, lengths[texts]
        self.longest = int(self.lengths.max())
        self.is_even = bool(self.lengths.min() == self.longest)
        self.in_text = np.arange(self.longest) < self.lengths[:, None]
        """[k, l]"""


class Sight(NamedTuple):
    """What a token sees in a layer's attention, beside T prompt tokens."""

    device: torch.device
    given: Tensor | None
    """A mask [b, 1, s, s] in place of ``causal`` and ``window``."""
    num_tokens: int
    """T."""
    causal: bool
    window: int | None
    """So many tokens at a time."""


class Rows:
    """The texts of a batch as one row of tokens."""

    def __init__(
        self,
        in_text: NDArray[np.bool_],
        sizes: Sequence[int],
        masks: Sequence[Tensor | None] = (None,),
        *,
        later: int = 0,
        prompt_tokens: int,
        width: int,
        device: torch.device,
    ) -> None:
        """See the class.

        Args:
            in_text: which places of the padded batch hold tokens [b, s].
            sizes: texts of each device.
            masks: attention mask [b, 1, s, s], None where a model's own is meant; the last one from layer ``later`` on.
            prompt_tokens: T.
            width: H.
            device: where the model takes its input.
        """
        self.lengths = in_text.sum(1)
        self.sizes = list(sizes)
        self.device = device
        self._in_text, self._masks, self._later = in_text, masks, later
        cost = CALL_COST.get(device.type, CALL_COST["cuda"]) / width
        self.groups = [Group(texts, self.lengths) for texts in groups_of(self.lengths, prompt_tokens, cost)]
        self._known: dict[Any, Any] = {}

    @cached_property
    def first(self) -> NDArray[np.int64]:
        """Where each text begins in the row [b]."""
        return np.cumsum(self.lengths) - self.lengths

    def pack(self, padded: Tensor) -> Tensor:
        """[1, n, ...] from [b, s, ...]."""
        return _gather(padded.flatten(0, 1), self._places_in(self._batch_places, padded))[None]

    def unpack(self, row: Tensor) -> Tensor:
        """[b, s, ...] from [1, n, ...], zeros where no text is."""
        return _spread(row[0], self._places_in(self._batch_places, row)).unflatten(0, self._in_text.shape)

    def at(self, columns: Tensor) -> Tensor:
        """Places [b] in the row of columns [b] of the texts."""
        return columns + self._on(columns.device, self.first)

    def of_devices(self, count: int) -> list[int]:
        """How many of so many rows of a tensor belong to each device: of n tokens, or of b texts."""
        if count == len(self.lengths):
            return self.sizes
        return [int(part.sum()) for part in np.split(self.lengths, np.cumsum(self.sizes)[:-1])]

    def attend(
        self,
        attention: Callable[..., Any],
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *args: Any,
        prefix: Tensor | None,
        memory: Any,
        causal: bool,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Attention's output [1, n, heads, head_dim], of each text by itself.

        Args:
            attention: a function of transformers.
            query: [1, heads, n, head_dim], as keys and values.
            prefix: the devices' prompt keys and values of the layer [N, 2, heads, T, head_dim].
            memory: `fedhpc.model.last_layer.Memory`; then n is b where the layer runs a second time.
        """
        if memory is not None and memory.known is not None and query.shape[2] == len(self.lengths):
            return self._at_slots(attention, module, query, memory.known, *args, **kwargs)
        keys, values, num_tokens = self._grouped(key), self._grouped(value), 0
        if prefix is not None:
            num_tokens = prefix.shape[3]
            firsts = [self._prefixes(prefix, group) for group in self.groups]
            keys = [torch.cat([first[:, 0], own], dim=2) for first, own in zip(firsts, keys, strict=True)]
            values = [torch.cat([first[:, 1], own], dim=2) for first, own in zip(firsts, values, strict=True)]
        which = self._masks[-1 if getattr(module, "layer_idx", 0) >= self._later else 0]
        sight = Sight(query.device, which, num_tokens, causal, kwargs.get("sliding_window"))
        if memory is not None and memory.known is None:  # it is known where the first pass is computed again
            memory.keep_groups(keys, values, [self._slot_rows(group, sight, memory.slots) for group in self.groups])
        masks = [self._mask(group, sight, may_skip=num_tokens == 0) for group in self.groups]
        parts = zip(self._grouped(query), keys, values, masks, strict=True)
        outputs = [attention(module, q, k, v, mask, *args, **kwargs)[0] for q, k, v, mask in parts]
        together = torch.cat([output.flatten(0, 1) for output in outputs])
        return _gather(together, self._places_in(self._group_places, together))[None], None

    def _at_slots(
        self, attention: Callable[..., Any], module: Any, query: Tensor, known: Any, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """The same at one position of each text: query [1, heads, b, head_dim], output [1, b, heads, head_dim]."""
        sizes = [len(group.texts) for group in self.groups]
        order = self._places_in(self._text_places, query)
        queries = _spread(query[0].transpose(0, 1), order).unsqueeze(2)
        parts = zip(queries.split(sizes), *known, strict=True)
        outputs = [attention(module, q, k, v, mask, *args, **kwargs)[0] for q, k, v, mask in parts]
        return _gather(torch.cat(outputs).flatten(0, 1), order)[None], None

    def _grouped(self, tensor: Tensor) -> list[Tensor]:
        """[k, heads, l, head_dim] of each group, zeros behind a text, from [1, heads, n, head_dim]."""
        placed = _spread(tensor[0].transpose(0, 1), self._places_in(self._group_places, tensor))
        parts = placed.split([group.in_text.size for group in self.groups])
        return [
            part.unflatten(0, group.in_text.shape).transpose(1, 2)
            for part, group in zip(parts, self.groups, strict=True)
        ]

    def _prefixes(self, prefix: Tensor, group: Group) -> Tensor:
        """Each text's own device's [k, 2, heads, T, head_dim] of [N, ...]."""
        bounds = np.searchsorted(group.texts, [0, *np.cumsum(self.sizes)])
        return rows_of_devices(prefix, np.diff(bounds).tolist())

    def _mask(self, group: Group, sight: Sight, *, may_skip: bool) -> Tensor | None:
        """[k or 1, 1, l, T + l]; None for all, or where ``may_skip`` for what comes before."""
        key = (id(group), sight, may_skip)
        if key not in self._known:
            self._known[key] = self._make_mask(group, sight, may_skip)
        mask: Tensor | None = self._known[key]
        return mask

    def _make_mask(self, group: Group, sight: Sight, may_skip: bool) -> Tensor | None:
        longest, device = group.longest, sight.device
        window = sight.window if sight.window is not None and sight.window < longest else None
        if sight.given is not None:
            mask, window = self._own_columns(group, sight.given.to(device)), None
        elif sight.causal:  # what comes behind a text is later than all of it
            if may_skip and window is None:
                return None
            mask = torch.ones(1, 1, longest, longest, dtype=torch.bool, device=device).tril()
        elif group.is_even and window is None:
            return None
        else:
            mask = self._on(device, group.in_text)[:, None, None].expand(-1, 1, longest, -1)
        if window is not None:
            places = torch.arange(longest, device=device)
            mask = mask & ((places[:, None] - places).abs() < window)
        return torch.nn.functional.pad(mask, (sight.num_tokens, 0), value=True)

    def _own_columns(self, group: Group, given: Tensor) -> Tensor:
        """A given mask [b, 1, s, s] of a group's texts, without the columns between their tokens [k, 1, l, l]."""
        columns = np.argsort(~self._in_text[group.texts], axis=1, kind="stable")[:, : group.longest]
        own, texts = (self._on(given.device, each) for each in (columns, group.texts))
        chosen = given[texts[:, None, None], 0, own[:, :, None], own[:, None, :]]
        # A place behind a text sees what the text's first token sees: something, and nobody sees it.
        in_text = self._on(given.device, group.in_text)
        return torch.where(in_text[:, :, None], chosen & in_text[:, None, :], in_text[:, None, :])[:, None]

    def _slot_rows(self, group: Group, sight: Sight, slots: Tensor) -> Tensor | None:
        """The mask [k, 1, 1, T + l] at the slots of a group's texts."""
        mask = self._mask(group, sight, may_skip=False)
        if mask is None:
            return None
        return mask_at(slots[self._on(slots.device, group.texts)], mask.expand(len(group.texts), -1, -1, -1))

    def _places_in(self, make: Callable[[], tuple[Any, ...]], tensor: Tensor) -> Places:
        """One of the kinds of places, on a tensor's device."""
        key = (make.__name__, tensor.device)
        if key not in self._known:
            inside, origins, is_inside = make()
            self._known[key] = Places(
                self._on(tensor.device, inside),
                self._on(tensor.device, origins),
                None if is_inside.all() else self._on(tensor.device, is_inside),
            )
        places: Places = self._known[key]
        return places

    def _batch_places(self) -> tuple[Any, ...]:
        """The row's tokens in the padded batch."""
        origins = np.maximum(np.cumsum(self._in_text) - 1, 0)
        return np.flatnonzero(self._in_text), origins, self._in_text.ravel()

    def _group_places(self) -> tuple[Any, ...]:
        """The row's tokens in the places of all groups."""
        origins = [self.first[group.texts][:, None] + np.arange(group.longest) for group in self.groups]
        is_inside = np.concatenate([group.in_text.ravel() for group in self.groups])
        origins_of_all = np.concatenate([each.ravel() for each in origins])
        inside = np.flatnonzero(is_inside)[np.argsort(origins_of_all[is_inside])]
        return inside, np.minimum(origins_of_all, self.lengths.sum() - 1), is_inside

    def _text_places(self) -> tuple[Any, ...]:
        """The texts in the order of all groups."""
        origins = np.concatenate([group.texts for group in self.groups])
        return np.argsort(origins), origins, np.ones(len(origins), np.bool_)

    @staticmethod
    def _on(device: torch.device, array: NDArray[Any]) -> Tensor:
        """On a device, to a GPU without waiting for it."""
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def mask_at(slots: Tensor, mask: Tensor) -> Tensor:
    """The rows [b, 1, 1, T + s] of a mask [b, 1, s, T + s] at slots [b]."""
    slots = slots.to(mask.device)
    return mask[torch.arange(len(slots), device=mask.device), :, slots].unsqueeze(2)


def groups_of(lengths: NDArray[np.int64], prompt_tokens: int, call_cost: float) -> list[NDArray[np.int64]]:
    """The texts in groups, from short to long, so that pairs of tokens and calls together cost least.

    Args:
        lengths: tokens of each text [b].
        prompt_tokens: keys before every text's own.
        call_cost: of a group, in pairs of tokens.
    """
    order = np.argsort(lengths, kind="stable")
    different, first = np.unique(lengths[order], return_index=True)
    ends = [*first[1:], len(lengths)]
    least, begin = np.zeros(len(different) + 1), np.zeros(len(different) + 1, np.int64)
    for last, (longest, end) in enumerate(zip(different, ends, strict=True)):
        costs = least[: last + 1] + call_cost + (end - first[: last + 1]) * longest * (longest + prompt_tokens)
        begin[last + 1] = costs.argmin()
        least[last + 1] = costs[begin[last + 1]]
    cuts = [len(different)]
    while cuts[-1]:
        cuts.append(int(begin[cuts[-1]]))
    bounds = [first[cut] if cut < len(different) else len(lengths) for cut in reversed(cuts)]
    return [np.sort(order[start:end]) for start, end in pairwise(bounds)]
