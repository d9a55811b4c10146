"""The loss of each trained token over a whole vocabulary, without logits of all tokens at once.

The head is frozen: all that the backward pass needs of a token's logits is the gradient by its hidden state, and that
is known as soon as the logits are. So they are computed in chunks of tokens and forgotten again, as in the fused
losses of Liger Kernel: Efficient Triton Kernels for LLM Training. Hsu et al. 2024. https://arxiv.org/abs/2410.10989.

Shapes: m trained tokens, H hidden size, V words.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fedhpc.model.numbers import at_least_float32

CHUNK_ELEMENTS = 1 << 25
"""Logits of a chunk at most, unless one token has more: 128 MiB in float32."""

Head = Callable[[Tensor], Tensor]
"""Logits [k, V], in the model's type, of hidden states [k, H]."""


def token_losses(head: Head, hidden: Tensor, tokens: Tensor, num_words: int) -> Tensor:
    """-log p of each token [m] in float32, that can be differentiated once.

    Args:
        hidden: states that predict them [m, H].
        tokens: [m].
        num_words: V.
    """
    losses: Tensor = _TokenLosses.apply(hidden, head, tokens, num_words)
    return losses


def plain_token_losses(head: Head, hidden: Tensor, tokens: Tensor) -> Tensor:
    """The same by all logits at once, that can be differentiated twice."""
    return functional.cross_entropy(at_least_float32(head(hidden)), tokens, reduction="none")


@torch.no_grad()
def token_scores(head: Head, hidden: Tensor, tokens: Tensor, num_words: int) -> tuple[Tensor, Tensor]:
    """-log p of each token [m] in float32, and whether it is the likeliest; arguments as those of `token_losses`."""
    losses, right = [], []
    for states, own in _chunks(hidden, tokens, num_words):
        logits = at_least_float32(head(states))
        losses.append(functional.cross_entropy(logits, own, reduction="none"))
        right.append(logits.argmax(1) == own)
    return torch.cat(losses), torch.cat(right)


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Head, tokens: Tensor, num_words: int) -> Tensor:
        losses: list[Tensor] = []
        gradients: list[Tensor] = []
        for states, own in _chunks(hidden, tokens, num_words):
            if not ctx.needs_input_grad[0]:
                losses.append(functional.cross_entropy(at_least_float32(head(states)), own, reduction="none"))
                continue
            with torch.enable_grad():
                leaf = states.detach().requires_grad_()
                logits = head(leaf)
            known = torch.arange(len(own), device=own.device), own
            slopes = at_least_float32(logits.detach()).log_softmax(1)
            losses.append(-slopes[known])
            slopes.exp_()
            slopes[known] -= 1
            gradients += torch.autograd.grad(logits, leaf, slopes.to(logits.dtype))
        ctx.save_for_backward(torch.cat(gradients) if gradients else hidden.new_empty(0))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        if torch.is_grad_enabled():  # with once_differentiable, a second derivative would silently lack a part
            raise RuntimeError("the loss of tokens in chunks can be differentiated once")
        (gradient,) = ctx.saved_tensors
        return (gradient * upstream[:, None]).to(gradient.dtype), None, None, None


def _chunks(hidden: Tensor, tokens: Tensor, num_words: int) -> Iterator[tuple[Tensor, Tensor]]:
    size = max(1, CHUNK_ELEMENTS // num_words)
    return zip(hidden.split(size), tokens.split(size), strict=True)
