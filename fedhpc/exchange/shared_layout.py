"""Where the parts of one request lie in the memory that workers of the server's host share with it.

The parts lie one behind the other: the offsets of each worker's records, of their end and of the sums; where the
command places devices; its payload; the records, worker by worker; the sums. A command without a payload and records
leaves those of the command before it in place: a checkpoint at a stop may save some of them.

Uploads that are added up stay there: each worker adds the same share of all of them, so that the work is the same
however many workers there are, and nobody writes where another one does.
"""

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from fedhpc.exchange.exact_sum import SumSize, Terms
from fedhpc.exchange.memory import HostMemory
from fedhpc.exchange.messages import PLACED, Command, RecordType
from fedhpc.methods.updates import Vector

LINE_BYTES = 64
"""Parts begin at multiples of this."""
OFFSETS, PLACES, PAYLOAD = (RecordType(np.dtype(form)) for form in ("<i8", PLACED, "<f4"))
NO_SUMS = SumSize(num_sums=0, size=0, num_terms=1)


class SharedLayout:
    """The layout of one request after the other, in the same memory."""

    def __init__(self, memory: HostMemory, near: NDArray[np.bool_]) -> None:
        """Begin without a request.

        Args:
            memory: the server's.
            near: which of the workers share it.
        """
        self.memory, self.near, self.num_workers = memory, near, len(near)

    def write_command(
        self, command: Command, record: RecordType, counts: Sequence[int], summed: SumSize | None
    ) -> tuple[np.ndarray, NDArray[np.int64]]:
        """Server: write the command into the memory; the places of the records, and of the sums [k, n]."""
        given, total = ((PLACES, command.placed), (PAYLOAD, command.payload)), sums_record(summed or NO_SUMS)
        sizes = [(part, array.size) for part, array in given]
        *begins, first, last, end = lay_out(self._offsets, *sizes, (record, sum(counts)), (total, 1))
        self.memory.reserve(end)
        offsets = np.array([*(first + record.nbytes * np.cumsum([0, *counts])), last])
        for begin, (part, array) in zip(begins, ((OFFSETS, offsets), *given), strict=True):
            self.memory.at(begin, part, array.size)[:] = array
        (sums,) = self.memory.at(last, total, 1)
        return self.memory.at(first, record, sum(counts)), sums

    def command_parts(self, num_placed: int, payload_size: int) -> tuple[np.ndarray, Vector]:
        """Worker: where the command places devices, and its payload."""
        parts = ((PLACES, num_placed), (PAYLOAD, payload_size))
        _, first, second, _ = lay_out(self._offsets, *parts)
        return self.memory.at(first, *parts[0]), self.memory.at(second, *parts[1])

    def rows(self, worker: int, record: RecordType, count: int) -> np.ndarray:
        """Worker: the place of its records."""
        return self.memory.at(int(self.memory.at(0, *self._offsets)[worker]), record, count)

    def add_up(self, worker: int, record: RecordType, of: SumSize, exponent: int) -> None:
        """Worker: write its share of the elements of the sums, over the uploads of all workers of this host."""
        begins, last = np.split(self.memory.at(0, *self._offsets), [-1])
        counts = np.diff(begins) // record.nbytes
        uploads = self.memory.at(int(begins[0]), record, int(counts.sum()))
        (sums,) = self.memory.at(int(last[0]), sums_record(of), 1)
        terms = Terms.of_uploads(uploads, of, np.repeat(self.near, counts))
        shares, index = np.linspace(0, of.size, self.near.sum() + 1, dtype=int), self.near[:worker].sum()
        terms.write(sums, exponent, shares[index], shares[index + 1])

    @property
    def _offsets(self) -> tuple[RecordType, int]:
        return OFFSETS, self.num_workers + 2


def lay_out(*parts: tuple[RecordType, int]) -> list[int]:
    """Where parts of so many records begin, one behind the other, and where the last one ends."""
    sizes = [-(-record.nbytes * count // LINE_BYTES) * LINE_BYTES for record, count in parts]
    return list(accumulate(sizes, initial=0))


def sums_record(of: SumSize) -> RecordType:
    """The form of sums in fixed point, [k, n]."""
    return RecordType(np.dtype(np.int64), (of.num_sums, of.size))
