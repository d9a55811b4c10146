"""Where the parts of one request lie in the memory that near workers share with the server.

One behind the other: where each worker's records begin, and last where the sums do; the workers of the command's packs
and its payload; the records, worker by worker; the sums. A command without a payload and records leaves those of the
one before alone: what a stop saves may be among them.
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
PLACES, PACKS, PAYLOAD = (RecordType(np.dtype(name)) for name in ("<i8", "<i4", "<f4"))
NO_SUMS = SumSize(num_sums=0, size=0, num_terms=1)


class Room:
    """The memory of one request after the other."""

    def __init__(self, memory: HostMemory, num_workers: int) -> None:
        self.memory, self.num_workers = memory, num_workers

    def furnish(
        self, command: Command, record: RecordType, counts: Sequence[int], summed: SumSize | None
    ) -> tuple[np.ndarray, NDArray[np.int64]]:
        """Server: put the command there; where the records and the sums will be."""
        given, total = ((PACKS, command.workers), (PAYLOAD, command.payload)), sums_record(summed or NO_SUMS)
        sizes = [(part, array.size) for part, array in given]
        *begins, first, last, end = lay_out(self._places, *sizes, (record, sum(counts)), (total, 1))
        self.memory.make_room(end)
        places = np.array([*(first + record.nbytes * np.cumsum([0, *counts[:-1]])), last])
        for begin, (part, array) in zip(begins, ((PLACES, places), *given), strict=True):
            self.memory.at(begin, part, array.size)[:] = array
        (sums,) = self.memory.at(last, total, 1)
        return self.memory.at(first, record, sum(counts)), sums

    def command_parts(self, num_packs: int, payload_size: int) -> tuple[NDArray[np.int32], Vector]:
        """Worker: the workers of the command's packs, and its payload."""
        parts = ((PACKS, num_packs), (PAYLOAD, payload_size))
        _, first, second, _ = lay_out(self._places, *parts)
        return self.memory.at(first, *parts[0]), self.memory.at(second, *parts[1])

    def rows(self, worker: int, record: RecordType, count: int) -> np.ndarray:
        """Worker: where its records go."""
        return self.memory.at(self._begin(worker), record, count)

    def add(self, worker: int, terms: Terms, exponent: int) -> None:
        """Worker: add its terms to the sums, in units for the largest ``exponent`` of all."""
        (sums,) = self.memory.at(self._begin(self.num_workers), sums_record(terms.of), 1)
        for block, part in terms.blocks(exponent, first=worker):
            with self.memory.alone(block.start, block.stop - block.start):
                sums[:, block] += part

    @property
    def _places(self) -> tuple[RecordType, int]:
        return PLACES, self.num_workers + 1

    def _begin(self, place: int) -> int:
        return int(self.memory.at(0, *self._places)[place])


def lay_out(*parts: tuple[RecordType, int]) -> list[int]:
    """Where parts of so many records begin, one behind the other, and where the last one ends."""
    sizes = [-(-record.nbytes * count // LINE_BYTES) * LINE_BYTES for record, count in parts]
    return list(accumulate(sizes, initial=0))


def sums_record(of: SumSize) -> RecordType:
    """Sums of terms in fixed point, [k, n]."""
    return RecordType(np.dtype(np.int64), (of.num_sums, of.size))
