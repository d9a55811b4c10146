"""Which layers are exchanged: strategies, a class each, and the lossless ratio."""

from fedhpc.selection import score, sensitivity, unscored  # noqa: F401
from fedhpc.selection.strategy import Strategy, make_strategy

__all__ = ["Strategy", "make_strategy"]
