"""The round as a device's work sees it; the message that announced it stays with the worker.

Compare the frozen context of apple/pfl-research, `pfl/context.py`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from fedhpc.methods.updates import Vector


@dataclass(frozen=True, kw_only=True)
class RoundContext:
    """What the server says about a round; vectors [n] have the layout of the exchanged tensors."""

    round: int
    """t, counted from 0."""
    layers: tuple[int, ...]
    """The layers that are exchanged."""
    pack: int = 1
    """How many devices train side by side."""
    clip: float = math.inf
    """C of `privacy`."""
    params: Vector
    """P^t."""
    sent: Mapping[str, Vector] = field(default_factory=dict)
    """The method's vectors that came with P^t, by name."""
