"""Numbers of a backbone: their precision, and what is said where it computes none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fedhpc.errors import ModelError, UserError, first_line
from fedhpc.job.deferred import Tensor, torch

NOT_TAKEN = (AttributeError, IndexError, RuntimeError, TypeError, ValueError)
"""What a model raises that does not take what it is given."""
LOSS_SCALE = 2.0**12
"""A power of two rounds nothing. Gradients of one example in a batch begin near 1e-3, and float16 ends at 6e-8."""


def mean_over_text(hidden: Tensor, in_text: Tensor) -> Tensor:
    """The mean [b, H] of hidden states [b, s, H] where the mask [b, s, 1] is set."""
    hidden = at_least_float32(hidden)  # float16 ends at 65504
    mask = in_text.to(hidden)
    return (hidden * mask).sum(1) / mask.sum(1)


def at_least_float32(tensor: Tensor) -> Tensor:
    """16-bit numbers as float32, others as they are."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@contextmanager
def no_surprise(refusal: str, advice: str = "") -> Iterator[None]:
    """ModelError in place of what a model raises that is not made as others are."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except (*NOT_TAKEN, KeyError) as error:
        raise ModelError(f"{refusal}: {first_line(error)}{advice}") from None
