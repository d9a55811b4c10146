"""Prompts in a backbone's attention, through transformers' attention interface.

The registered attention functions are wrapped so that a `prompts` argument, when a forward pass carries one, puts the
layer's prompt keys and values first. Without it they do what they did before. No model code is patched.

Shapes: b examples, s positions, L layers, T prompt tokens per layer, D key width.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward


def prompted(attention: Callable[..., Any]) -> Callable[..., Any]:
    """An attention function of transformers with the layer's prompt keys and values put first."""

    def attend(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        prompts: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if prompts is not None:
            batch, heads, _, head_dim = key.shape  # heads: of keys and values
            num_tokens = prompts.shape[-2]
            prefix = prompts[module.layer_idx].to(key.device, key.dtype)  # [2, T, D]
            prefix = prefix.view(2, 1, num_tokens, heads, head_dim).transpose(2, 3)  # [2, 1, heads, T, head_dim]
            key = torch.cat([prefix[0].expand(batch, -1, -1, -1), key], dim=2)
            value = torch.cat([prefix[1].expand(batch, -1, -1, -1), value], dim=2)
            causal = kwargs.get("is_causal")
            causal = getattr(module, "is_causal", True) if causal is None else causal
            attention_mask = _widen(
                attention_mask, query, num_tokens, causal=causal and attention is sdpa_attention_forward
            )
        return attention(module, query, key, value, attention_mask, *args, **kwargs)

    return attend


def _widen(mask: Tensor | None, query: Tensor, num_tokens: int, *, causal: bool) -> Tensor | None:
    """The mask [b, s] or [b, 1, s, s] with T visible columns in front."""
    if mask is not None:
        return functional.pad(mask, (num_tokens, 0), value=0.0 if mask.is_floating_point() else True)
    # SDPA's causal flag would align causality to the first key; FlashAttention aligns it to the last.
    return _causal_mask(query.shape[2], num_tokens, query.device) if causal else None


@lru_cache(maxsize=64)
def _causal_mask(length: int, num_tokens: int, device: torch.device) -> Tensor:
    return torch.ones(length, num_tokens + length, dtype=torch.bool, device=device).tril(num_tokens)[None, None]


def register() -> None:
    """Make every backbone's attention take prompts."""
    AttentionInterface.register("sdpa", prompted(sdpa_attention_forward))
    for version in (2, 3):
        AttentionInterface.register(f"flash_attention_{version}", prompted(flash_attention_forward))
