"""Where the parts of one request lie in the memory that workers of the server's host share with it.

The parts lie one behind the other: the offsets of each worker's records and of the sums; the workers of the command's
packs; its payload; the records, worker by worker; the sums. A command without a payload and records leaves those of the
command before it in place: a checkpoint at a stop may save some of them.
"""

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from fedhpc.exchange.exact_sum import SumSize, Terms
from fedhpc.exchange.memory import HostMemory
from fedhpc.exchange.messages import Command, RecordType
from fedhpc.methods.updates import Vector

LINE_BYTES = 64
"""Parts begin at multiples of this."""
OFFSETS, PACKS, PAYLOAD = (RecordType(np.dtype(name)) for name in ("<i8", "<i4", "<f4"))
NO_SUMS = SumSize(num_sums=0, size=0, num_terms=1)


class SharedLayout:
    """The layout of one request after the other, in the same memory."""

    def __init__(self, memory: HostMemory, num_workers: int) -> None:
        self.memory, self.num_workers = memory, num_workers

    def write_command(
        self, command: Command, record: RecordType, counts: Sequence[int], summed: SumSize | None
    ) -> tuple[np.ndarray, NDArray[np.int64]]:
        """Server: write the command into the memory; the places of the records, and of the sums [k, n]."""
        given, total = ((PACKS, command.workers), (PAYLOAD, command.payload)), sums_record(summed or NO_SUMS)
        sizes = [(part, array.size) for part, array in given]
        *begins, first, last, end = lay_out(self._offsets, *sizes, (record, sum(counts)), (total, 1))
        self.memory.reserve(end)
        offsets = np.array([*(first + record.nbytes * np.cumsum([0, *counts[:-1]])), last])
        for begin, (part, array) in zip(begins, ((OFFSETS, offsets), *given), strict=True):
            self.memory.at(begin, part, array.size)[:] = array
        (sums,) = self.memory.at(last, total, 1)
        return self.memory.at(first, record, sum(counts)), sums

    def command_parts(self, num_packs: int, payload_size: int) -> tuple[NDArray[np.int32], Vector]:
        """Worker: the workers of the command's packs, and its payload."""
        parts = ((PACKS, num_packs), (PAYLOAD, payload_size))
        _, first, second, _ = lay_out(self._offsets, *parts)
        return self.memory.at(first, *parts[0]), self.memory.at(second, *parts[1])

    def rows(self, worker: int, record: RecordType, count: int) -> np.ndarray:
        """Worker: the place of its records."""
        return self.memory.at(self._offset(worker), record, count)

    def add(self, worker: int, terms: Terms, exponent: int) -> None:
        """Worker: add its terms to the sums, in units for the largest ``exponent`` of all."""
        (sums,) = self.memory.at(self._offset(self.num_workers), sums_record(terms.of), 1)
        for block, part in terms.blocks(exponent, first=worker):
            with self.memory.locked(block.start, block.stop - block.start):
                sums[:, block] += part

    @property
    def _offsets(self) -> tuple[RecordType, int]:
        return OFFSETS, self.num_workers + 1

    def _offset(self, part: int) -> int:
        return int(self.memory.at(0, *self._offsets)[part])


def lay_out(*parts: tuple[RecordType, int]) -> list[int]:
    """Where parts of so many records begin, one behind the other, and where the last one ends."""
    sizes = [-(-record.nbytes * count // LINE_BYTES) * LINE_BYTES for record, count in parts]
    return list(accumulate(sizes, initial=0))


def sums_record(of: SumSize) -> RecordType:
    """The form of sums in fixed point, [k, n]."""
    return RecordType(np.dtype(np.int64), (of.num_sums, of.size))
