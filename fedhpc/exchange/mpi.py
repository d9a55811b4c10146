"""Real ranks: the only import of mpi4py.

The server calls :meth:`MpiExchange.request`; a command is broadcast and fixed-size records come back into one buffer,
each worker's as soon as it has them, while others are still at work. Every buffer is contiguous, allocated once and
used again. Beside that order, small notes pass at any time: every rank says what it is doing, a rank that was asked to
stop tells the server, the server tells all.

Whoever waits for another rank's work sleeps between two looks. A message of a few bytes goes straight to every rank: in
a tree each rank on the way would have to wake up first.
"""

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedhpc.errors import Halt, RanksLost, UserError
from fedhpc.exact_sum import NOTHING, SumSize
from fedhpc.exchange.base import DEFAULT_TIMEOUT_S, LONGEST_GAP_S, Exchange, Traffic
from fedhpc.exchange.watchdog import ABORT_S, Watchdog, bounded
from fedhpc.messages import HEADER, NOTE, Command, Kind, Note, Op, RecordType
from fedhpc.stopping import StopRequest

PROBLEM_BYTES = 4096
DIGEST_BYTES = 64
SHORTEST_NAP_S, LONGEST_NAP_S = 1e-5, 0.005
NAP_SHARE = 0.15
"""Of the time waited so far: what a rank may oversleep."""
LOOK_S = 0.002
"""Between two looks at the mail while waiting; a look takes longer than a test."""
TRANSFER_NAP_S = 1e-4
"""Data moves only while its ranks look; between large parts there is no time to sleep."""
BEAT_S = 5.0
BEATS_PER_TIMEOUT = 5
PARTING_S = 0.2
FLOAT_BYTES = 4
PAGE_BYTES = 4096
"""Unit of a device's state on its way."""
LOSSES = ("ERR_PROC_FAILED", "ERR_PROC_FAILED_PENDING", "ERR_REVOKED", "ERR_IN_STATUS")
"""Error classes that say that a rank is gone, or that another rank has noticed it."""
NOTES, STATE, SUMS, COMMAND, ANSWER, RECORDS, UNIT = range(7)
"""Tags of messages between two ranks."""
PAYLOAD = RecordType(np.dtype(np.float32))
ANSWERS = np.dtype([("halted", "?"), ("exponent", "<i8")])
"""What a worker says when it is done with a command: whether it was halted, and the exponent of its terms."""


class MpiExchange(Exchange):
    """Rank 0 is the server, ranks 1 to size - 1 are the workers. Uses a private communicator."""

    def __init__(self, stop: StopRequest, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        super().__init__(stop, timeout_s)
        with bounded(timeout_s):
            from mpi4py import MPI  # noqa: PLC0415 - a single process needs no MPI at all

        self._mpi: Any = MPI
        self._watchdog = Watchdog()
        self._types: dict[int, Any] = {}
        self._repaired = False
        self._loss_classes = {getattr(MPI, name) for name in LOSSES if hasattr(MPI, name)}
        self._abandoned: list[BaseException] = []
        """Errors whose frames hold requests and buffers that a transfer may still use."""
        with self._inside("the start of MPI"):
            self._join(MPI.COMM_WORLD.Dup())

    def request(
        self, command: Command, record: RecordType, counts: Sequence[int], *, summed: SumSize | None = None
    ) -> np.ndarray:
        """See :class:`Exchange`."""
        self._activity = f"asking all ranks to {command.op.name.lower()}, round {command.round}"
        self.attend()
        self._refuse_when_stopped(command)
        start = time.perf_counter()
        self._tell(range(self.num_workers), command.header(), COMMAND)
        with self._inside("the broadcast"):
            for part in (command.workers, command.payload):
                self._broadcast(part)
        sent = time.perf_counter()
        if command.op in (Op.STOP, Op.SUSPEND):
            return record.zeros(0)
        records = self._buffer(record, sum(counts))
        ready = self._collect(records, counts if record.nbytes else [0] * self.num_workers, summed)
        end = time.perf_counter()
        self.traffic = Traffic(
            bytes_down=self.num_workers * command.nbytes,
            bytes_up=records.nbytes + (summed.nbytes if summed else 0),
            seconds={"broadcast": sent - start, "local": ready - sent, "gather": end - ready},
        )
        return records

    def receive(self) -> Command:
        """Worker: the server's next command; its payload is valid until the next one arrives."""
        header = np.zeros(1, HEADER)
        self._activity = "waiting for the server"
        with self._losses():
            self._finish(self._comm.Irecv([header, self._mpi.BYTE], source=0, tag=COMMAND), LONGEST_NAP_S)
        with self._inside("the broadcast"):
            workers = np.zeros(header[0]["num_packs"], np.int32)
            payload = self._buffer(PAYLOAD, int(header[0]["payload_size"]))
            self._broadcast(workers)
            self._broadcast(payload)
        return Command.from_header(header, workers, payload)

    def reply(self, records: np.ndarray | None) -> None:
        """Worker: send this worker's records; None if it was halted."""
        self._activity = "waiting for the other ranks"
        terms, self._terms = self._terms, None
        answer = np.array([(records is None, terms.exponent if terms else NOTHING)], ANSWERS)
        with self._inside("the gather"):
            self._finish(self._comm.Isend([answer, self._mpi.BYTE], dest=0, tag=ANSWER))
            if records is None:
                return
            if records.nbytes:
                source = [np.ascontiguousarray(records), len(records), self._type(records[0].nbytes)]
                self._finish(self._comm.Isend(source, dest=0, tag=RECORDS))
        if terms:
            with self._losses():
                self._finish(self._comm.Irecv([answer, self._mpi.BYTE], source=0, tag=UNIT), LONGEST_NAP_S)
            if not answer[0]["halted"]:
                self._send_sums(terms.fixed(int(answer[0]["exponent"])))

    def beat(self, activity: str) -> None:
        """See :class:`Exchange`."""
        self._activity = activity
        self.attend()
        if self._halted:
            raise Halt

    def post(self, note: Note) -> None:
        """See :class:`Exchange`."""
        self._outbox.append(note)

    def trade(self, outgoing: Sequence[tuple[int, bytes]], incoming: Sequence[int]) -> list[bytes]:
        """See :class:`Exchange`."""
        with self._inside("an exchange of device states"):
            requests = []
            for worker, data in outgoing:
                pages = -(-len(data) // PAGE_BYTES)
                whole = [data.ljust(pages * PAGE_BYTES, b"\0"), pages, self._type(PAGE_BYTES)]
                size = [np.array([len(data)], np.int64), self._mpi.BYTE]
                requests += [self._comm.Isend(part, dest=worker + 1, tag=STATE) for part in (size, whole)]
            received = [self._receive_state(worker + 1) for worker in incoming]
            for request in requests:
                self._finish(request)
        return received

    def agree(self, problem: str | None, digest: str) -> None:
        """See :class:`Exchange`."""
        mine = np.zeros(PROBLEM_BYTES, np.uint8)
        text = (digest.ljust(DIGEST_BYTES) + (problem or "")).encode()[:PROBLEM_BYTES]
        mine[: len(text)] = np.frombuffer(text, np.uint8)
        everyone = np.zeros((self.size, PROBLEM_BYTES), np.uint8)
        self._activity = "set-up done, waiting for the other ranks"
        self._meet()
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
        """See :class:`Exchange`; by ULFM's revoke and shrink."""
        if "OMPI_MCA_mpi_ft_enable" not in os.environ:
            raise RanksLost("exchange.on_rank_failure: continue needs an MPI with ULFM: mpirun --with-ft ulfm")
        first = self._join_survivors(self.rank)
        if first != 0:
            raise RanksLost("rank 0, the server, is lost")
        if not self.num_workers:
            raise RanksLost("no rank with devices is left")
        self._repaired = True

    def part(self, status: int) -> None:
        """See :class:`Exchange`."""
        self.stop.close()
        try:
            self._meet()
        except RanksLost:  # all is done and saved
            self._repaired = True
        sys.stdout.flush()
        sys.stderr.flush()
        if self._repaired:  # MPI_Finalize can hang then
            time.sleep(PARTING_S)
        else:
            with bounded(self.timeout_s):
                self._mpi.Finalize()
        # Without Python's own long way out: nobody is left to notice a rank that hangs there.
        os._exit(status)

    def abort(self, status: int) -> None:
        """See :class:`Exchange`."""
        sys.stdout.flush()
        sys.stderr.flush()
        with self._watchdog.over("MPI_Abort", ABORT_S):
            self._comm.Abort(status)

    def _join_survivors(self, old_rank: int) -> int:
        """The number that the new rank 0 had."""
        for _ in range(self.size):
            with suppress(RanksLost), self._inside("the repair after a loss"):  # another one may be lost meanwhile
                self._comm.Revoke()
                self._join(self._comm.Shrink())
                first = np.array([old_rank], np.int64)
                self._comm.Bcast(first, root=0)
                return int(first[0])
        raise RanksLost("the ranks that are left do not find together")

    def _join(self, comm: Any) -> None:
        self._comm = comm
        self.rank, self.size = comm.rank, comm.size
        self.num_workers = self.size - 1
        host_comm = comm.Split_type(self._mpi.COMM_TYPE_SHARED)
        self.local_rank, self.ranks_here = host_comm.rank, host_comm.size
        host_comm.Free()
        self._workers = comm.Split(color=min(self.rank, 1))
        """The workers among themselves."""
        hosts = np.zeros((self.size, 64), np.uint8)
        name = self.host.encode()[:64]
        hosts[self.rank, : len(name)] = np.frombuffer(name, np.uint8)
        comm.Allgather(self._mpi.IN_PLACE, [hosts, self._mpi.BYTE])
        self._hosts = [row.tobytes().rstrip(b"\0").decode(errors="replace") for row in hosts]
        self._buffers: dict[RecordType, np.ndarray] = {}
        self._outbox: deque[Note] = deque()
        self._activity = "setting up"
        self._halted = self._stop_told = False
        self._under_way: list[tuple[Any, np.ndarray]] = []
        peers = range(1, self.size) if self.rank == 0 else [0]
        self._silence = dict.fromkeys(peers, 0.0)
        """Seconds of our own waking time since a peer was last heard."""
        self._doing = dict.fromkeys(peers, "starting")
        self._last_look = time.monotonic()
        self._since_beat = 0.0

    def _tell(self, workers: Iterable[int], word: np.ndarray, tag: int) -> None:
        with self._losses():
            for worker in workers:
                self._finish(self._comm.Isend([word, self._mpi.BYTE], dest=worker + 1, tag=tag))

    def _collect(self, records: np.ndarray, counts: Sequence[int], summed: SumSize | None) -> float:
        """Take every worker's records when it has them, and add up the sums; when the last worker was done.

        Raises:
            Halt: a worker was halted.
        """
        answers = np.zeros(self.num_workers, ANSWERS)
        rows = np.split(records, np.cumsum(counts)[:-1])
        with self._losses():
            coming = [
                self._comm.Irecv([answers[worker : worker + 1], self._mpi.BYTE], source=worker + 1, tag=ANSWER)
                for worker in range(self.num_workers)
            ]
            on_their_way = []

            def all_have_answered() -> bool:
                for worker in self._mpi.Request.Testsome(coming) or ():
                    if counts[worker] and not answers[worker]["halted"]:
                        target = [rows[worker], counts[worker], self._type(rows[worker][0].nbytes)]
                        on_their_way.append(self._comm.Irecv(target, source=worker + 1, tag=RECORDS))
                return all(request == self._mpi.REQUEST_NULL for request in coming)

            self._wait(all_have_answered, LONGEST_NAP_S)
        ready = time.perf_counter()
        with self._inside("the gather"):
            for request in on_their_way:
                self._finish(request)
        common = np.array([(answers["halted"].any(), answers["exponent"].max())], ANSWERS)
        if summed:
            self._tell(np.flatnonzero(~answers["halted"]), common, UNIT)
        if common[0]["halted"]:
            raise Halt
        if summed:
            self.sums = self._receive_sums(summed, int(common[0]["exponent"]))
        return ready

    def _broadcast(self, part: np.ndarray) -> None:
        if part.size:
            self._finish(self._comm.Ibcast([part, 1, self._type(part.nbytes)], root=0))

    def _receive_state(self, rank: int) -> bytes:
        size = np.zeros(1, np.int64)
        self._finish(self._comm.Irecv([size, self._mpi.BYTE], source=rank, tag=STATE))
        pages = -(-int(size[0]) // PAGE_BYTES)
        data = np.empty(pages * PAGE_BYTES, np.uint8)
        self._finish(self._comm.Irecv([data, pages, self._type(PAGE_BYTES)], source=rank, tag=STATE))
        return data[: size[0]].tobytes()

    def _send_sums(self, sums: np.ndarray) -> None:
        """To the first worker, by a tree; from there to the server, which so gets them once."""
        total = self._buffer(RecordType(sums.dtype, sums.shape), 1)[0] if self.rank == 1 else None
        with self._inside("a reduction"):
            self._finish(self._workers.Ireduce(sums, total, self._mpi.SUM, root=0))
            if total is not None:
                self._finish(self._comm.Isend([total, 1, self._type(total.nbytes)], dest=0, tag=SUMS))

    def _receive_sums(self, of: SumSize, exponent: int) -> NDArray[np.float64]:
        sums = self._buffer(RecordType(np.dtype(np.int64), (of.num_sums, of.size)), 1)[0]
        with self._inside("a reduction"):
            self._finish(self._comm.Irecv([sums, 1, self._type(sums.nbytes)], source=1, tag=SUMS))
        return of.floats(sums, exponent)

    def _meet(self) -> None:
        """Wait for all ranks without spinning, so that waiters leave the cores alone."""
        with self._losses():
            self._finish(self._comm.Ibarrier(), LONGEST_NAP_S)

    def _finish(self, request: Any, longest_nap_s: float = TRANSFER_NAP_S) -> None:
        """Wait for an operation."""
        self._wait(request.Test, longest_nap_s)

    def _wait(self, is_over: Callable[[], bool], longest_nap_s: float) -> None:
        """Wait, and go on saying and noticing who is alive."""
        began = looked = time.monotonic()
        while not is_over():
            now = time.monotonic()
            if now - looked > LOOK_S:
                self.attend()
                looked = now
            time.sleep(min(max(SHORTEST_NAP_S, NAP_SHARE * (now - began)), longest_nap_s))

    def attend(self) -> None:
        """See :class:`Exchange`: send what is due, read what has come, notice who is silent."""
        self._look_for_failure()
        with self._losses():
            self._exchange_notes()
        for peer, silent in self._silence.items():
            if silent > self.timeout_s:
                raise TimeoutError(
                    f"rank {peer} on {self._hosts[peer]} has not been heard of for {silent:.0f} s "
                    f"(exchange.timeout_s: {self.timeout_s:g}); last known: {self._doing[peer]}"
                )

    def _exchange_notes(self) -> None:
        now = time.monotonic()
        passed, self._last_look = now - self._last_look, now
        self._since_beat += passed
        self._silence = {peer: silent + min(passed, LONGEST_GAP_S) for peer, silent in self._silence.items()}
        self._under_way = [(request, buffer) for request, buffer in self._under_way if not request.Test()]
        self._read_notes()
        if self.stop and not self._stop_told:
            self._stop_told = True
            self._send_all(
                Note(kind=Kind.HALT)
                if self.rank == 0
                else Note(
                    kind=Kind.STOP,
                    text=f"{self.stop.reason} at rank {self.rank} ({self.host})",
                    seconds=now - self.stop.since,
                )
            )
        while self._outbox:
            self._send_all(self._outbox.popleft())
        if self._since_beat >= min(BEAT_S, self.timeout_s / BEATS_PER_TIMEOUT) and not self._under_way:
            self._since_beat = 0.0
            self._send_all(Note(kind=Kind.BEAT, text=self._activity))

    def _read_notes(self) -> None:
        status = self._mpi.Status()
        while self._comm.Iprobe(source=self._mpi.ANY_SOURCE, tag=NOTES, status=status):
            packed = np.zeros(1, NOTE)
            self._comm.Recv([packed, self._mpi.BYTE], source=status.source, tag=NOTES)
            note = Note.unpacked(packed)
            self._silence[status.source] = 0.0
            if note.kind == Kind.BEAT:
                self._doing[status.source] = note.text
            elif note.kind == Kind.STOP:
                self.stop.ask(note.text, note.seconds)
            elif note.kind == Kind.HALT:
                self._halted = True
            else:
                self._deliver(note)

    def _send_all(self, note: Note) -> None:
        """To the server from a worker, to every worker from the server."""
        packed = note.packed()
        for peer in self._silence:
            self._under_way.append((self._comm.Isend([packed, self._mpi.BYTE], dest=peer, tag=NOTES), packed))

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
