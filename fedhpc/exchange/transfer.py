"""How records reach the server from workers that do not share its memory: a message each, as soon as it is made."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fedhpc.exchange.connection import Connection
from fedhpc.exchange.exact_sum import SumSize
from fedhpc.exchange.messages import UPLOAD_HEADER, RecordType, Tag

FLOAT_BYTES = 4


class Types:
    """MPI types of one whole message or record: counts stay small, so messages may pass 2 GiB."""

    def __init__(self, mpi: Any) -> None:
        self._mpi = mpi
        self._types: dict[tuple[int, int], Any] = {}

    def of(self, nbytes: int, extent: int | None = None) -> Any:
        """The type.

        Args:
            nbytes: bytes that are sent.
            extent: bytes that the whole takes in memory, where they are more.
        """
        key = (nbytes, extent or nbytes)
        if key not in self._types:
            sent = self._mpi.FLOAT.Create_contiguous(nbytes // FLOAT_BYTES)
            self._types[key] = sent.Create_resized(0, key[1]).Commit()
        return self._types[key]

    def of_record(self, records: np.ndarray, summed: SumSize | None) -> Any:
        """The type of one of these records; of an upload that is added up, the header is sent."""
        nbytes = RecordType.of(records).nbytes
        return self.of(UPLOAD_HEADER.itemsize if summed else nbytes, nbytes)


class RecordTransfer:
    """One rank's end."""

    def __init__(self, connection: Connection, types: Types) -> None:
        self._connection, self._types = connection, types
        self.leaving: list[Any] = []
        """Worker: the requests by which the records of the next reply leave, in their order."""

    def send(self, records: np.ndarray, summed: SumSize | None) -> None:
        """Worker: begin to send those of the next reply's first records that do not leave already."""
        if not self._connection.shares_memory:
            for row in range(len(self.leaving), len(records)):
                source = [records[row : row + 1], 1, self._types.of_record(records, summed)]
                self.leaving.append(self._connection.comm.Isend(source, dest=0, tag=Tag.RECORDS))

    def receive(self, records: np.ndarray, counts: Sequence[int], summed: SumSize | None) -> list[list[Any]]:
        """Server: begin to receive what workers send of so many records each; the requests of each of them."""
        ends = np.cumsum(counts)
        return [
            [
                self._connection.comm.Irecv(
                    [records[row : row + 1], 1, self._types.of_record(records, summed)],
                    source=worker + 1,
                    tag=Tag.RECORDS,
                )
                for row in range(ends[worker] - counts[worker], ends[worker])
            ]
            for worker in np.flatnonzero(~self._connection.near).tolist()
        ]
