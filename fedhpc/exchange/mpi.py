"""Real ranks.

The server calls `MpiExchange.request`; a command is broadcast and fixed-size records come back into one buffer,
each as soon as it is made, while its worker and others still work. Every buffer is contiguous, allocated once and
used again. Workers on the server's host read the command and write their records in its memory; only what goes to other
hosts is sent. Beside that order, small notes pass at any time: every rank says what it is doing, a rank that was asked
to stop tells the server, the server tells all.

Whoever waits for another rank's work sleeps between two tests. A message of a few bytes goes straight to every rank: in
a tree each rank on the way would have to wake up first.
"""

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from fedhpc.errors import Halt, RanksLost, UserError
from fedhpc.exchange.base import DEFAULT_TIMEOUT_S, Exchange, Traffic
from fedhpc.exchange.connection import Connection
from fedhpc.exchange.control_channel import ControlChannel
from fedhpc.exchange.exact_sum import ZERO_EXPONENT, SumSize
from fedhpc.exchange.loading import load_mpi
from fedhpc.exchange.memory import ADDRESS, ring
from fedhpc.exchange.messages import HEADER, UPLOAD_HEADER, Command, Note, Op, RecordType, Tag
from fedhpc.exchange.reduction import Reduction
from fedhpc.exchange.repair import repair
from fedhpc.exchange.shared_layout import PAYLOAD, PLACES, SharedLayout
from fedhpc.exchange.transfer import RecordTransfer, Types
from fedhpc.exchange.watchdog import ABORT_S, Watchdog, end_launcher_later, time_limit
from fedhpc.job.status import RankStatus
from fedhpc.job.stopping import StopRequest

PROBLEM_BYTES = 4096
DIGEST_BYTES = 64
SHORTEST_SLEEP_S, LONGEST_SLEEP_S = 1e-5, 0.005
SLEEP_SHARE = 0.15
"""A rank sleeps for this share of the time that it has waited so far, and may oversleep by as much."""
PROGRESS_S = 0.002
"""Seconds between two calls of `progress` while waiting; one takes longer than a test of a request."""
DOORBELL_SLEEP_S = 0.1
"""Longest sleep of a rank whose peers all ring when they have sent something."""
TRANSFER_SLEEP_S = 1e-4
"""Longest sleep during a transfer: data moves only while its ranks test their requests."""
GRACE_S = 0.2
"""After a repair, in place of MPI_Finalize, which can hang then."""
PAGE_BYTES = 4096
"""A device's state is sent in units of this."""
LOSSES = ("ERR_PROC_FAILED", "ERR_PROC_FAILED_PENDING", "ERR_REVOKED", "ERR_IN_STATUS")
"""Error classes that say that a rank is gone, or that another rank has noticed it."""
COMMAND = np.dtype([("header", HEADER), ("address", ADDRESS)])
"""What goes straight to every worker: a command's header, and where workers of the same host find the rest of it."""
REPLY = np.dtype([("halted", "?"), ("sent", "<i8"), ("exponent", "<i8")])
"""What a worker says when it is done with a command: whether it was halted, how many records it has sent, and the
exponent of its terms."""


class MpiExchange(Exchange):
    """Rank 0 is the server, ranks 1 to size - 1 are the workers. Uses a private communicator."""

    def __init__(self, stop: StopRequest, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        super().__init__(stop, timeout_s)
        with time_limit(timeout_s):
            mpi = load_mpi()
        self._mpi: Any = mpi
        self._watchdog = Watchdog()
        self._types = Types(mpi)
        self._repaired = False
        self._loss_classes = {getattr(mpi, name) for name in LOSSES if hasattr(mpi, name)}
        self._connection = Connection(mpi)
        self._abandoned: list[object] = []
        """Buffers and requests that a transfer may still use, and errors whose frames hold some."""
        with self._inside("the start of MPI"):
            self._join(mpi.COMM_WORLD.Dup())

    def request(
        self, command: Command, record: RecordType, counts: Sequence[int], *, summed: SumSize | None = None
    ) -> np.ndarray:
        """See `Exchange`."""
        self._control.activity = f"asking all ranks to {command.op.name.lower()}, round {command.round}"
        self.progress()
        self._refuse_when_stopped(command)
        start = time.perf_counter()
        records, sums = self._layout.write_command(command, record, counts, summed)
        message = np.array([(command.header()[0], self._connection.memory.address[0])], COMMAND)
        self._send_to_workers(range(self.num_workers), message, Tag.COMMAND)
        with self._inside("the broadcast"):
            for part in (command.placed, command.payload):
                self._broadcast(part)
        sums[...] = 0  # while devices train; workers of this host write them when they are told the unit
        sent = time.perf_counter()
        if command.op in (Op.FINISH, Op.SUSPEND):
            return record.zeros(0)
        ready, exponent = self._collect(records, counts if record.nbytes else [0] * self.num_workers, summed)
        bytes_up = records.nbytes
        if summed:
            with self._inside("a reduction"):
                arrived = self._reduction.take(sums, counts, masked=summed.masked)
            self.sums, self.exponent = sums, exponent
            bytes_up = len(records) * UPLOAD_HEADER.itemsize + arrived * summed.nbytes
        end = time.perf_counter()
        self._control.activity = f"at work itself after {command.op.name.lower()}, round {command.round}"
        self.traffic = Traffic(
            bytes_down=self.num_workers * command.nbytes,
            bytes_up=bytes_up,
            seconds={"broadcast": sent - start, "local": ready - sent, "gather": end - ready},
        )
        return records

    def receive(self) -> Command:
        """Worker: the server's next command; its payload is valid until the next one arrives."""
        message = np.zeros(1, COMMAND)
        self._control.activity = "waiting for the server"
        self._receive_from_server(message, Tag.COMMAND)
        header = message["header"]
        num_placed, payload_size = int(header[0]["num_placed"]), int(header[0]["payload_size"])
        if self._connection.shares_memory:
            self._connection.memory.attach(message["address"])
            placed, payload = self._layout.command_parts(num_placed, payload_size)
        else:
            placed, payload = self.buffer(PLACES, num_placed), self.buffer(PAYLOAD, payload_size)
            with self._inside("the broadcast"):
                self._broadcast(placed)
                self._broadcast(payload)
        return Command.from_header(header, placed, payload)

    def rows(self, record: RecordType, count: int) -> np.ndarray:
        """See `Exchange`."""
        if not self._connection.shares_memory:
            return super().rows(record, count)
        return self._layout.rows(self.rank - 1, record, count)

    def reply(self, records: np.ndarray | None) -> None:
        """Worker: send this worker's records; None if it was halted."""
        self._control.activity = "waiting for the other ranks"
        terms, self._terms = self._terms, None
        if records is not None and records.nbytes:
            if self._connection.shares_memory:
                rows = self.rows(RecordType.of(records), len(records))
                if not np.may_share_memory(records, rows):
                    rows[:] = records
            with self._losses():
                self._transfer.send(records, terms.of if terms else None)
        exponent = terms.exponent if terms else ZERO_EXPONENT
        reply = np.array([(records is None, len(self._transfer.leaving), exponent)], REPLY)
        with self._inside("the gather"):
            self._wait(self._comm.Isend([reply, self._mpi.BYTE], dest=0, tag=Tag.REPLY))
            self._connection.ring(0)
            while self._transfer.leaving:
                self._wait(self._transfer.leaving.pop(0))
        if terms and records is not None:
            self._receive_from_server(reply, Tag.EXPONENT)
            if not reply[0]["halted"]:
                with self._inside("a reduction"):
                    self._reduction.send(records, terms, int(reply[0]["exponent"]))

    def send_ahead(self, records: np.ndarray, count: int) -> None:
        """See `Exchange`; those that are added up have to wait for all others."""
        with self._losses():
            self._transfer.send(records[:count], None)

    def beat(self, activity: str) -> None:
        """See `Exchange`."""
        self._control.activity = activity
        self.progress()
        if self._control.halted:
            raise Halt

    def heard(self) -> list[RankStatus]:
        """See `Exchange`."""
        return self._control.heard()

    def post(self, note: Note) -> None:
        """See `Exchange`."""
        self._control.outgoing.append(note)
        ring(self._connection.doorbell.file)

    def move_states(self, outgoing: Sequence[tuple[int, bytes]], incoming: Sequence[int]) -> list[bytes]:
        """See `Exchange`."""
        with self._inside("an exchange of device states"):
            requests = []
            for worker, data in outgoing:
                pages = -(-len(data) // PAGE_BYTES)
                whole = [data.ljust(pages * PAGE_BYTES, b"\0"), pages, self._types.of(PAGE_BYTES)]
                size = [np.array([len(data)], np.int64), self._mpi.BYTE]
                requests += [self._comm.Isend(part, dest=worker + 1, tag=Tag.STATE) for part in (size, whole)]
            received = [self._receive_state(worker + 1) for worker in incoming]
            for request in requests:
                self._wait(request)
        return received

    def agree(self, problem: str | None, digest: str) -> None:
        """See `Exchange`."""
        mine = np.zeros(PROBLEM_BYTES, np.uint8)
        text = (digest.ljust(DIGEST_BYTES) + (problem or "")).encode(errors="backslashreplace")[:PROBLEM_BYTES]
        mine[: len(text)] = np.frombuffer(text, np.uint8)
        everyone = np.zeros((self.size, PROBLEM_BYTES), np.uint8)
        self._control.activity = "set-up done, waiting for the other ranks"
        self._barrier()
        with self._inside("an exchange of set-up results"):
            self._comm.Allgather([mine, self._mpi.BYTE], [everyone, self._mpi.BYTE])
        texts = [row.tobytes().rstrip(b"\0").decode(errors="replace") for row in everyone]
        for rank, found in enumerate(texts):
            if found[DIGEST_BYTES:]:
                raise UserError(found[DIGEST_BYTES:] if rank == 0 else f"rank {rank}: {found[DIGEST_BYTES:]}")
        for rank, found in enumerate(texts):
            if found != texts[0]:
                raise UserError(
                    f"rank {rank} has read another configuration or other data than rank 0: a file was changed while "
                    "the ranks started (start them again), or the nodes see different files"
                )

    def repair(self) -> None:
        """See `Exchange`; by ULFM."""
        self._abandoned += [self._buffers, self._transfer]
        repair(self._connection, self._join, self._inside)
        self._repaired = True

    def finalize(self) -> None:
        """See `Exchange`."""
        self.stop.close()
        try:
            self._barrier()
        except RanksLost:  # all is done and saved
            self._repaired = True
        sys.stdout.flush()
        sys.stderr.flush()
        if self._repaired:  # MPI_Finalize can hang then
            time.sleep(GRACE_S)
        else:
            with time_limit(self.timeout_s):
                self._mpi.Finalize()

    def leave(self) -> None:
        """See `Exchange`."""
        self._barrier()
        self._buffers = {}
        self._connection.free()

    def abort(self, status: int) -> None:
        """See `Exchange`."""
        sys.stdout.flush()
        sys.stderr.flush()
        end_launcher_later()
        with self._watchdog.over("MPI_Abort", ABORT_S):
            self._comm.Abort(status)

    def _join(self, comm: Any) -> None:
        """Go on with the ranks of this communicator, all of which must call this."""
        self._connection.join(comm)
        self._comm = comm
        self.rank, self.size = comm.rank, comm.size
        self.num_workers = self.size - 1
        self.local_rank, self.ranks_here = self._connection.local_rank, self._connection.ranks_here
        self._buffers = {}  # after a loss, a transfer of before may still write in the old ones
        self._transfer = RecordTransfer(self._connection, self._types)
        self._layout = SharedLayout(self._connection.memory, self._connection.near)
        self._reduction = Reduction(self._mpi, self._connection, self._layout, self._types, self._wait_for_transfer)
        self._control = ControlChannel(
            self._mpi, comm, self._connection.hosts, self.stop, deliver=self._deliver, ring=self._connection.ring
        )

    def _send_to_workers(self, workers: Iterable[int], message: np.ndarray, tag: Tag) -> None:
        with self._losses():
            for worker in workers:
                self._wait(self._comm.Isend([message, self._mpi.BYTE], dest=worker + 1, tag=tag))
                self._connection.ring(worker + 1)

    def _receive_from_server(self, message: np.ndarray, tag: Tag) -> None:
        """Wait for a message of a few bytes, however long the server is at work before it."""
        with self._losses():
            request = self._comm.Irecv([message, self._mpi.BYTE], source=0, tag=tag)
            self._wait(request, LONGEST_SLEEP_S, with_doorbell=True)

    def _collect(self, records: np.ndarray, counts: Sequence[int], summed: SumSize | None) -> tuple[float, int]:
        """Take every record when its worker has it; when the last worker was done, the exponent of all terms.

        Raises:
            Halt: a worker was halted.
        """
        replies = np.zeros(self.num_workers, REPLY)
        with self._losses():
            pending = [
                self._comm.Irecv([replies[worker : worker + 1], self._mpi.BYTE], source=worker + 1, tag=Tag.REPLY)
                for worker in range(self.num_workers)
            ]
            receiving = self._transfer.receive(records, counts, summed)

            def all_have_replied() -> bool:
                self._mpi.Request.Testsome(pending)
                return all(request == self._mpi.REQUEST_NULL for request in pending)

            self._wait_until(all_have_replied, LONGEST_SLEEP_S, with_doorbell=True)
        ready = time.perf_counter()
        with self._inside("the gather"):
            for requests, sent in zip(receiving, replies["sent"][~self._connection.near], strict=True):
                for request in requests[sent:]:  # of a worker that was halted
                    request.Cancel()
                for request in requests:
                    self._wait(request)
        common = np.array([(replies["halted"].any(), 0, replies["exponent"].max())], REPLY)
        if summed:
            self._send_to_workers(np.flatnonzero(~replies["halted"]), common, Tag.EXPONENT)
        if common[0]["halted"]:
            raise Halt
        return ready, int(common[0]["exponent"])

    def _broadcast(self, part: np.ndarray) -> None:
        if part.size and self._connection.remote.size > 1:
            self._wait(self._connection.remote.Ibcast([part, 1, self._types.of(part.nbytes)], root=0))

    def _receive_state(self, rank: int) -> bytes:
        size = np.zeros(1, np.int64)
        self._wait(self._comm.Irecv([size, self._mpi.BYTE], source=rank, tag=Tag.STATE))
        pages = -(-int(size[0]) // PAGE_BYTES)
        data = np.empty(pages * PAGE_BYTES, np.uint8)
        self._wait(self._comm.Irecv([data, pages, self._types.of(PAGE_BYTES)], source=rank, tag=Tag.STATE))
        return data[: size[0]].tobytes()

    def _barrier(self) -> None:
        """Wait for all ranks without spinning, so that waiters leave the cores alone."""
        with self._losses():
            self._wait(self._comm.Ibarrier(), LONGEST_SLEEP_S)

    def _wait(self, request: Any, longest_sleep_s: float = TRANSFER_SLEEP_S, *, with_doorbell: bool = False) -> None:
        """Wait for an operation."""
        self._wait_until(request.Test, longest_sleep_s, with_doorbell=with_doorbell)

    def _wait_for_transfer(self, is_over: Callable[[], bool], *, with_doorbell: bool = False) -> None:
        self._wait_until(is_over, TRANSFER_SLEEP_S, with_doorbell=with_doorbell)

    def _wait_until(self, is_over: Callable[[], bool], longest_sleep_s: float, *, with_doorbell: bool = False) -> None:
        """Wait, and make progress meanwhile.

        Args:
            is_over: what is waited for; tested between two sleeps.
            longest_sleep_s: the longest sleep between two tests.
            with_doorbell: peers that share memory with this rank ring when it is over, so that sleeps can be longer.
        """
        began = progressed = time.monotonic()
        if with_doorbell and self._connection.all_ring:
            began, longest_sleep_s = -math.inf, DOORBELL_SLEEP_S
        while not is_over():
            now = time.monotonic()
            if now - progressed > PROGRESS_S:
                self.progress()
                progressed = now
            if self._connection.doorbell.wait(min(max(SHORTEST_SLEEP_S, SLEEP_SHARE * (now - began)), longest_sleep_s)):
                began = now

    def progress(self) -> None:
        """See `Exchange`; also notices ranks that are silent."""
        self._look_for_failure()
        with self._losses():
            self._control.progress(self.timeout_s)

    @contextmanager
    def _inside(self, what: str) -> Iterator[None]:
        with self._losses(), self._watchdog.over(what, self.timeout_s):
            yield

    @contextmanager
    def _losses(self) -> Iterator[None]:
        try:
            yield
        except self._mpi.Exception as error:
            if error.Get_error_class() not in self._loss_classes:
                raise
            self._abandoned.append(error)
            raise RanksLost(f"another rank is lost: {error}") from error
