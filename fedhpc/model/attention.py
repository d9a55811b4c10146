"""Prompts in a backbone's attention, through transformers' attention interface.

The registered attention functions are wrapped so that a `prompts` argument, L tensors [N, 2, T, D], when a forward
pass carries one, puts the layer's prompt keys and values first, those of an example's own device; `sizes` [N] says
how many examples each device has, `rows` that texts lie one behind the other (fedhpc.model.rows), `memory` belongs to
fedhpc.model.last_layer, `later` is another mask, from some layer on. Without them they do what they did before. No
model code is patched.

Shapes: N devices, b examples, s positions, L layers, T prompt tokens per layer, D key width.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from fedhpc.model.last_layer import Memory
from fedhpc.model.overlay import rows_of_devices
from fedhpc.model.rows import Rows


def prompted(attention: Callable[..., Any]) -> Callable[..., Any]:
    """An attention function of transformers with the layer's prompt keys and values put first."""
    is_sdpa = attention is sdpa_attention_forward
    attention = _exact(attention)

    def attend(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        prompts: Sequence[Tensor] | None = None,
        sizes: Sequence[int] = (),
        rows: Rows | None = None,
        memory: Memory | None = None,
        later: tuple[int, Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        if (later is not None or prompts is not None) and not hasattr(module, "layer_idx"):
            raise AttributeError("its attention modules do not say which layer they are in")
        causal = kwargs.get("is_causal")
        causal = is_sdpa and (getattr(module, "is_causal", True) if causal is None else causal)
        prefix = None if prompts is None else _split_heads(prompts[module.layer_idx], key)
        if rows is not None:
            return rows.attend(
                attention, module, query, key, value, *args, prefix=prefix, memory=memory, causal=causal, **kwargs
            )
        if later is not None and module.layer_idx >= later[0]:
            attention_mask = later[1]
        if memory is not None and memory.known is not None:
            key, value, attention_mask = memory.known
        elif prefix is not None or memory is not None:
            num_tokens = 0 if prefix is None else prefix.shape[3]
            if prefix is not None:
                key, value = (_put_first(prefix[:, i], own, sizes) for i, own in enumerate((key, value)))
            attention_mask = _widen(attention_mask, query, key, num_tokens, causal=causal)
            if memory is not None:
                memory.keep(key, value, attention_mask)
        return attention(module, query, key, value, attention_mask, *args, **kwargs)

    return attend


def _exact(attention: Callable[..., Any]) -> Callable[..., Any]:
    """The same function; on a CPU it computes in float32 at least."""

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *args: Any, **kwargs: Any
    ) -> Any:
        if query.device.type == "cpu" and query.dtype in (torch.bfloat16, torch.float16):
            # PyTorch's 16-bit attention is several times slower on a CPU, in the backward pass above all.
            exact = (tensor.float() for tensor in (query, key, value))
            if attention_mask is not None and attention_mask.is_floating_point():
                attention_mask = attention_mask.float()
            output, weights = attention(module, *exact, attention_mask, *args, **kwargs)
            return output.to(query.dtype), weights
        return attention(module, query, key, value, attention_mask, *args, **kwargs)

    return attend


def _split_heads(prompts: Tensor, key: Tensor) -> Tensor:
    """A layer's prompts [N, 2, heads, T, head_dim] from [N, 2, T, D], with as many heads as keys [b, heads, s, ...]."""
    return prompts.to(key.device, key.dtype).unflatten(3, (key.shape[1], key.shape[3])).transpose(2, 3)


def _put_first(prefix: Tensor, tensor: Tensor, sizes: Sequence[int]) -> Tensor:
    """Keys or values [b, heads, T + s, head_dim]: before each example's own, the prefix [N, ...] of its device."""
    if len(set(sizes)) == 1:
        grouped = tensor.unflatten(0, (len(sizes), sizes[0]))
        rows = prefix.unsqueeze(1).expand(-1, sizes[0], -1, -1, -1)
        return torch.cat([rows, grouped], dim=3).flatten(0, 1)
    return torch.cat([rows_of_devices(prefix, sizes), tensor], dim=2)


def _widen(mask: Tensor | None, query: Tensor, key: Tensor, num_tokens: int, *, causal: bool) -> Tensor | None:
    """The mask [b, k] or [b, 1, s, k] with T visible columns in front; where there is none, that of all keys."""
    if mask is not None:
        return functional.pad(mask, (num_tokens, 0), value=0.0 if mask.is_floating_point() else True)
    if not causal or query.shape[2] == 1:  # the last token sees everything
        return None
    # SDPA's causal flag would align causality to the first key; FlashAttention aligns it to the last.
    return _causal_mask(query.shape[2], key.shape[2], query.device)


@lru_cache(maxsize=64)
def _causal_mask(length: int, num_keys: int, device: torch.device) -> Tensor:
    return torch.ones(length, num_keys, dtype=torch.bool, device=device).tril(num_keys - length)[None, None]


def forget_masks() -> None:
    """Make causal masks anew from here on."""
    _causal_mask.cache_clear()


def register() -> None:
    """Make every backbone's attention take prompts."""
    AttentionInterface.register("sdpa", prompted(sdpa_attention_forward))
    for version in (2, 3):
        AttentionInterface.register(f"flash_attention_{version}", prompted(flash_attention_forward))
