"""Sums of float32 vectors whose bits depend neither on the order of the terms nor on how ranks group them.

Terms become fixed-point numbers, 64-bit integers in units of a power of two, and integers add up exactly. The unit
is the smallest with which no sum can overflow; next to the largest term it is 2^-62 times their number, less than
float64 would round. Compare: Demmel, Nguyen, Parallel Reproducible Summation, IEEE Transactions on Computers, 2015.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedhpc.exchange.messages import upload_headers, upload_payloads
from fedhpc.methods.updates import BLOCK, Fault, Vector

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
    masked: bool = False
    """Whether a rank's sums leave it as they are, masked, and nothing else of its uploads does."""

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
    """Terms of k sums of vectors [n]: sum_j is the sum over i of coefficients[i, j] * vectors[i]."""

    coefficients: NDArray[np.int64]
    """Shape [m, k]."""
    vectors: Sequence[Vector]
    """m finite vectors [n]."""
    of: SumSize

    @classmethod
    def of_uploads(cls, records: np.ndarray, of: SumSize, here: NDArray[np.bool_] | Literal[True] = True) -> "Terms":
        """What the sound ones of upload records [any, ...] add: their counts times their payloads, or also once.

        Args:
            records: the uploads.
            of: the sums.
            here: which of them to take.
        """
        headers, payloads = upload_headers(records), upload_payloads(records, of.size)
        rows = np.flatnonzero(here & (headers["fault"] == Fault.NONE))
        counts = headers["count"][rows]
        return cls(
            coefficients=np.stack([counts, np.ones_like(counts)][: of.num_sums], axis=1),
            vectors=[payloads[row] for row in rows],
            of=of,
        )

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
        """The sums, shape [k, n], in units for the largest ``exponent`` of all ranks."""
        sums = np.empty((self.of.num_sums, self.of.size), np.int64)
        self.write(sums, exponent, 0, self.of.size)
        return sums

    def write(self, sums: NDArray[np.int64], exponent: int, first: int, end: int) -> None:
        """Write the elements from ``first`` to before ``end`` of what `fixed` returns into ``sums`` [k, n]."""
        scale = 1 / self.of.unit(exponent)
        for begin in range(first, end, BLOCK):
            block = slice(begin, min(begin + BLOCK, end))
            sums[:, block] = 0
            for row, vector in zip(self.coefficients.tolist(), self.vectors, strict=True):
                scaled = vector[block].astype(np.float64) * scale
                for total, coefficient in zip(sums, row, strict=True):
                    term = scaled * coefficient
                    total[block] += np.rint(term, out=term).astype(np.int64)
