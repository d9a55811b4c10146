"""The network: the only import of mpi4py, and its serial twin.

The server calls :meth:`Exchange.request`; a command is broadcast and fixed-size records come back by one gatherv. Every
buffer is contiguous, allocated once and used again.
"""

import math
import os
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedhpc.errors import UserError
from fedhpc.messages import HEADER, Command, Op, RecordType

SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
LAUNCHER_VARIABLES = (*SIZE_VARIABLES, "PMIX_RANK", "PMI_RANK")
"""Set by mpirun or srun in every process that they start as an MPI rank."""
PROBLEM_BYTES = 4096
LONGEST_NAP_S = 0.005
FLOAT_BYTES = 4
PAYLOAD = RecordType(np.dtype(np.float32))

Handler = Callable[[Command], np.ndarray]


@dataclass
class Traffic:
    """What one request moved between ranks, and how long each part took."""

    bytes_down: int = 0
    bytes_up: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    """By part: broadcast, local (until the last worker was done), gather."""


class Exchange(ABC):
    """One rank's end of the network."""

    rank: int
    size: int
    local_rank: int
    """Among the ranks of this host."""
    num_workers: int

    def __init__(self) -> None:
        self.host = socket.gethostname()
        self.traffic = Traffic()
        """Of the latest request."""

    @abstractmethod
    def request(self, command: Command, record: RecordType, counts: Sequence[int]) -> np.ndarray:
        """Server: send a command to every worker, return their records, worker by worker.

        Args:
            command: what is asked; its payload is broadcast as one contiguous float32 buffer.
            record: form of one reply record.
            counts: records that each worker will send.

        Returns:
            Records [sum(counts)], valid until the next request with the same record type.
        """

    @abstractmethod
    def agree(self, problem: str | None) -> None:
        """All ranks: raise UserError everywhere, with one and the same message, if any rank has a problem."""

    @abstractmethod
    def abort(self) -> None:
        """End every rank of the job, non-zero, now."""


class LocalExchange(Exchange):
    """One process: the server's commands go straight to the worker."""

    def __init__(self) -> None:
        super().__init__()
        self.rank, self.size, self.local_rank, self.num_workers = 0, 1, 0, 1
        self.handler: Handler | None = None

    def request(self, command: Command, record: RecordType, counts: Sequence[int]) -> np.ndarray:
        """See :class:`Exchange`."""
        assert self.handler is not None
        start = time.perf_counter()
        records = self.handler(command)
        self.traffic = Traffic(seconds={"broadcast": 0.0, "local": time.perf_counter() - start, "gather": 0.0})
        return records

    def agree(self, problem: str | None) -> None:
        """See :class:`Exchange`."""
        if problem is not None:
            raise UserError(problem)

    def abort(self) -> None:
        """See :class:`Exchange`."""
        raise SystemExit(1)


class MpiExchange(Exchange):
    """Real ranks: rank 0 is the server, ranks 1 to size - 1 are the workers. Uses a private communicator."""

    def __init__(self) -> None:
        super().__init__()
        from mpi4py import MPI  # noqa: PLC0415 - a single process needs no MPI at all

        self._mpi: Any = MPI
        self._comm = MPI.COMM_WORLD.Dup()
        self.rank, self.size = self._comm.rank, self._comm.size
        self.num_workers = self.size - 1
        host_comm = self._comm.Split_type(MPI.COMM_TYPE_SHARED)
        self.local_rank = host_comm.rank
        host_comm.Free()
        self._buffers: dict[RecordType, np.ndarray] = {}
        self._types: dict[int, Any] = {}

    def request(self, command: Command, record: RecordType, counts: Sequence[int]) -> np.ndarray:
        """See :class:`Exchange`."""
        start = time.perf_counter()
        header = command.header()
        self._meet()
        self._comm.Bcast([header, self._mpi.BYTE], root=0)
        if command.payload.size:
            self._comm.Bcast([command.payload, 1, self._type(command.payload.nbytes)], root=0)
        sent = time.perf_counter()
        if command.op == Op.STOP:
            return record.zeros(0)
        self._meet()
        ready = time.perf_counter()
        records = self._buffer(record, sum(counts))
        if record.nbytes:
            displacements = np.concatenate([[0, 0], np.cumsum(counts)[:-1]])
            target = [records, ([0, *counts], displacements), self._type(record.nbytes)]
            self._comm.Gatherv([None, 0, self._type(record.nbytes)], target, root=0)
        end = time.perf_counter()
        self.traffic = Traffic(
            bytes_down=self.num_workers * (header.nbytes + command.payload.nbytes),
            bytes_up=records.nbytes,
            seconds={"broadcast": sent - start, "local": ready - sent, "gather": end - ready},
        )
        return records

    def receive(self) -> Command:
        """Worker: the server's next command; its payload is valid until the next one arrives."""
        header = np.zeros(1, HEADER)
        self._meet()
        self._comm.Bcast([header, self._mpi.BYTE], root=0)
        payload = self._buffer(PAYLOAD, int(header[0]["payload_size"]))
        if payload.size:
            self._comm.Bcast([payload, 1, self._type(payload.nbytes)], root=0)
        return Command.from_header(header, payload)

    def reply(self, records: np.ndarray) -> None:
        """Worker: send this worker's records."""
        self._meet()
        nbytes = records.dtype.itemsize * math.prod(records.shape[1:])
        if nbytes:
            self._comm.Gatherv([np.ascontiguousarray(records), len(records), self._type(nbytes)], None, root=0)

    def agree(self, problem: str | None) -> None:
        """See :class:`Exchange`."""
        mine = np.zeros(PROBLEM_BYTES, np.uint8)
        text = (problem or "").encode()[:PROBLEM_BYTES]
        mine[: len(text)] = np.frombuffer(text, np.uint8)
        everyone = np.zeros((self.size, PROBLEM_BYTES), np.uint8)
        self._meet()
        self._comm.Allgather([mine, self._mpi.BYTE], [everyone, self._mpi.BYTE])
        problems = [row.tobytes().rstrip(b"\0").decode(errors="replace") for row in everyone]
        for rank, found in enumerate(problems):
            if found:
                raise UserError(found if rank == 0 else f"rank {rank}: {found}")

    def abort(self) -> None:
        """See :class:`Exchange`."""
        self._comm.Abort(1)

    def _meet(self) -> None:
        """Wait for all ranks without spinning: on a node with more ranks than cores, waiters leave the cores alone."""
        request, nap = self._comm.Ibarrier(), 1e-5
        while not request.Test():
            time.sleep(nap)
            nap = min(2 * nap, LONGEST_NAP_S)

    def _type(self, nbytes: int) -> Any:
        """An MPI type of one whole message or record: counts stay small, so messages may pass 2 GiB."""
        if nbytes not in self._types:
            self._types[nbytes] = self._mpi.FLOAT.Create_contiguous(nbytes // FLOAT_BYTES).Commit()
        return self._types[nbytes]

    def _buffer(self, record: RecordType, count: int) -> np.ndarray:
        buffer = self._buffers.get(record)
        if buffer is None or len(buffer) < count:
            buffer = self._buffers[record] = record.zeros(count)
        return buffer[:count]


def connect() -> Exchange:
    """The network this process was started into: MPI under a launcher, else the serial twin.

    Raises:
        UserError: the processes that were started together do not find each other.
    """
    if not any(variable in os.environ for variable in LAUNCHER_VARIABLES):
        return LocalExchange()
    exchange = MpiExchange()
    for variable in SIZE_VARIABLES:
        if (launched := int(os.environ.get(variable, exchange.size))) != exchange.size:
            raise UserError(
                f"the launcher started {launched} processes ({variable}), but MPI sees {exchange.size}: mpirun and the "
                "MPI library that mpi4py loads are not of the same installation"
            )
    return exchange if exchange.size > 1 else LocalExchange()
