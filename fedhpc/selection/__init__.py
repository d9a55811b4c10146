"""Which layers are exchanged: strategies, and the lossless ratio."""

from fedhpc.selection.strategy import Strategy, make_strategy

__all__ = ["Strategy", "make_strategy"]
