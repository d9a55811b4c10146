"""Units for a column of numbers or an axis: one for all of it, by its largest and smallest numbers."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Quantity = Literal["score", "rounds", "steps", "bytes", "seconds"]

UNITS: dict[Quantity, dict[str, float]] = {
    "bytes": {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12},
    "seconds": {"ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0},
}
MOST_PLAIN = 1e9
"""Larger numbers have an exponent."""
DECIMALS: dict[Quantity, int] = {"score": 3, "rounds": 1, "steps": 0}


@dataclass(frozen=True, kw_only=True)
class Unit:
    """How numbers of a quantity are written."""

    name: str
    """Empty where there is none."""
    size: float
    decimals: int

    def text(self, value: float) -> str:
        """The number alone."""
        shown = value / self.size
        return f"{shown:.{self.decimals}f}" if abs(shown) < MOST_PLAIN else f"{shown:.3g}"

    def full_text(self, value: float) -> str:
        """The number and its unit."""
        return f"{self.text(value)} {self.name}".rstrip()


def unit_for(quantity: Quantity, values: Iterable[float]) -> Unit:
    """The unit in which the largest of the values is at least 2, with three digits, and none but 0 is below 0.1."""
    sizes = [abs(value) for value in values if value]
    largest, smallest = max(sizes, default=0.0), min(sizes, default=0.0)
    if quantity not in UNITS:
        return Unit(name="", size=1.0, decimals=DECIMALS[quantity])
    units = UNITS[quantity]
    name, size = next(
        ((n, s) for n, s in reversed(units.items()) if largest >= 2 * s and smallest >= 0.1 * s),
        next(iter(units.items())),
    )
    wanted = [2 - math.floor(math.log10(largest / size)), 1 - math.floor(math.log10(smallest / size))] if sizes else [0]
    return Unit(name=name, size=size, decimals=0 if name == "B" else min(3, max(0, *wanted)))
