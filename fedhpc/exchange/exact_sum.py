"""Sums of float32 vectors whose bits depend neither on the order of the terms nor on how ranks group them.

Terms become fixed-point numbers, 64-bit integers in units of a power of two, and integers add up exactly. The unit
is the smallest with which no sum can overflow; next to the largest term it is 2^-62 times their number, less than
float64 would round. Compare: Demmel, Nguyen, Parallel Reproducible Summation, IEEE Transactions on Computers, 2015.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedhpc.methods.updates import BLOCK, Vector

SUM_BITS = 62
ZERO_EXPONENT = -(1 << 20)
"""Exponent of terms that are all zero."""


@dataclass(frozen=True, kw_only=True)
class SumSize:
    """What the ranks must agree upon."""

    num_sums: int
    """k, the number of sums."""
    size: int
    """n, the length of the vectors."""
    num_terms: int
    """An upper bound of the number of terms of all ranks together."""

    @property
    def nbytes(self) -> int:
        """Bytes of the sums in fixed point."""
        return 8 * self.num_sums * self.size

    def unit(self, exponent: int) -> float:
        """The number for which 1 stands in fixed point, a power of two, where no term is larger than 2^exponent."""
        return 1.0 if exponent == ZERO_EXPONENT else 2.0 ** (exponent + self.num_terms.bit_length() - SUM_BITS)

    def floats(self, sums: NDArray[np.int64], exponent: int) -> NDArray[np.float64]:
        """The sums [k, n] as numbers."""
        return sums.astype(np.float64) * self.unit(exponent)


@dataclass(frozen=True, kw_only=True)
class Terms:
    """One rank's terms of k sums of vectors [n]: sum_j is the sum over i of coefficients[i, j] * vectors[i]."""

    coefficients: NDArray[np.int64]
    """Shape [m, k]."""
    vectors: Sequence[Vector]
    """m finite vectors [n]."""
    of: SumSize

    @property
    def exponent(self) -> int:
        """The least e with |coefficients[i, j] * element| <= 2^e everywhere."""
        largest = [
            int(abs(row).max()) * float(np.abs(vector).max())
            for row, vector in zip(self.coefficients, self.vectors, strict=True)
            if vector.size
        ]
        return int(np.frexp(max(largest))[1]) if any(largest) else ZERO_EXPONENT

    def fixed(self, exponent: int) -> NDArray[np.int64]:
        """This rank's part of the sums, shape [k, n], in units for the largest ``exponent`` of all ranks."""
        sums = np.zeros((self.of.num_sums, self.of.size), np.int64)
        for block, part in self.blocks(exponent):
            sums[:, block] = part
        return sums

    def blocks(self, exponent: int, *, first: int = 0) -> Iterator[tuple[slice, NDArray[np.int64]]]:
        """What `fixed` returns, block by block of elements.

        The first one is block ``first``, and after the last block comes block 0, so that ranks which add to the same
        memory begin at different places. A rank without terms yields no block.
        """
        if not self.vectors:
            return
        scale = 1 / self.of.unit(exponent)
        begins = deque(range(0, self.of.size, BLOCK))
        begins.rotate(-first)
        for begin in begins:
            block = slice(begin, min(begin + BLOCK, self.of.size))
            part = np.zeros((self.of.num_sums, block.stop - begin), np.int64)
            for row, vector in zip(self.coefficients.tolist(), self.vectors, strict=True):
                scaled = vector[block].astype(np.float64) * scale
                for total, coefficient in zip(part, row, strict=True):
                    total[:] += np.rint(scaled * coefficient).astype(np.int64)
            yield block, part
