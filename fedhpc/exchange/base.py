"""The network as the server and the workers see it."""

import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedhpc.config.sections import ExchangeConfig
from fedhpc.errors import Halt
from fedhpc.exchange.exact_sum import ZERO_EXPONENT, SumSize, Terms
from fedhpc.exchange.messages import Command, Note, NoteKind, Op, RecordType
from fedhpc.job.status import RankStatus
from fedhpc.job.stopping import StopRequest

INTERRUPTIBLE = (Op.SCORE, Op.PROBE, Op.TRAIN, Op.RATIO, Op.EVALUATE, Op.GENERATE)
DEFAULT_TIMEOUT_S = ExchangeConfig().timeout_s
LONGEST_GAP_S = 1.0
"""At most this counts as silence of others between two calls of `progress`: a suspended job finds no rank late."""


@dataclass
class Traffic:
    """What one request moved between ranks, and how long each part took."""

    bytes_down: int = 0
    bytes_up: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds of each part: broadcast, local (until the last worker was done), gather."""

    def __add__(self, other: "Traffic") -> "Traffic":
        """Of two requests together; beside local work, the other's is part of the gather."""
        seconds = {**self.seconds, "gather": self.seconds["gather"] + sum(other.seconds.values())}
        return Traffic(self.bytes_down + other.bytes_down, self.bytes_up + other.bytes_up, seconds)


class Exchange(ABC):
    """One rank's end of the network."""

    rank: int
    size: int
    local_rank: int
    """This rank's number among the ranks of this host."""
    ranks_here: int
    """How many ranks this host has."""
    num_workers: int

    def __init__(self, stop: StopRequest, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        self.host = socket.gethostname()
        self.stop = stop
        self.timeout_s = timeout_s
        self.traffic = Traffic()
        """What the latest request moved."""
        self.sums: NDArray[np.int64] = np.empty((0, 0), np.int64)
        """Server: the sums that came with the latest reply, in fixed point [k, n], valid until the next request."""
        self.exponent = ZERO_EXPONENT
        """Server: that of their unit."""
        self._terms: Terms | None = None
        self.on_saved: Callable[[Note], None] = lambda note: None
        """Server: takes the workers' notes about checkpoint files."""
        self._failure: BaseException | None = None
        self._buffers: dict[RecordType, np.ndarray] = {}

    @abstractmethod
    def request(
        self, command: Command, record: RecordType, counts: Sequence[int], *, summed: SumSize | None = None
    ) -> np.ndarray:
        """Server: send a command to every worker, return their records, worker by worker.

        Args:
            command: what is asked; its payload is broadcast as one contiguous float32 buffer.
            record: form of one reply record.
            counts: records that each worker will send.
            summed: the workers reply with uploads that are added up to such sums, see `add_up`; they go to `sums`, the
                exponent of their unit to `exponent`.

        Returns:
            Records [sum(counts)], valid until the next request with the same record type; of uploads that are added up,
            only the headers count.

        Raises:
            Halt: a stop was requested before all workers were done with a command that can be interrupted.
        """

    def rows(self, record: RecordType, count: int) -> np.ndarray:
        """Worker: where to write the records of the next reply so that they need not be copied there."""
        return self.buffer(record, count)

    def buffer(self, record: RecordType, count: int) -> np.ndarray:
        """Records of this rank alone, the same memory whenever it is asked for."""
        buffer = self._buffers.get(record)
        if buffer is None or len(buffer) < count:
            buffer = self._buffers[record] = record.zeros(count)
        return buffer[:count]

    def send_ahead(self, records: np.ndarray, count: int) -> None:  # noqa: B027 - there may be nothing to do
        """Worker: the first ``count`` records of the next reply will not change any more, so that they may leave."""

    @abstractmethod
    def beat(self, activity: str) -> None:
        """A heartbeat: say what this rank is about to do, and make progress; between any two local steps.

        Raises:
            Halt: worker: a stop was requested.
        """

    @abstractmethod
    def progress(self) -> None:
        """Send and read the notes that are due, while waiting for something other than a command or a reply."""

    @abstractmethod
    def heard(self) -> list[RankStatus]:
        """Server: what each rank is doing, as far as this one has heard; from any thread."""

    @abstractmethod
    def post(self, note: Note) -> None:
        """Worker: a note to the server; from any thread."""

    @abstractmethod
    def move_states(self, outgoing: Sequence[tuple[int, bytes]], incoming: Sequence[int]) -> list[bytes]:
        """Workers: pass on devices' states.

        Args:
            outgoing: worker and data; what goes to one worker arrives there in this order.
            incoming: from which workers data will come, in the order of the result.
        """

    def add_up(self, terms: Terms) -> None:
        """Worker: the next reply are uploads of which only the headers and the sums of these terms go to the server."""
        self._terms = terms

    def fail(self, error: BaseException) -> None:
        """From a thread beside the main one: raise this error in the main thread, at its next call of `progress`."""
        self._failure = error

    @abstractmethod
    def agree(self, problem: str | None, digest: str) -> None:
        """All ranks: raise UserError everywhere, with one and the same message, if any rank has a problem.

        Args:
            digest: stands for what this rank has read, at most 64 characters; a difference between ranks is a problem.
        """

    @abstractmethod
    def repair(self) -> None:
        """After RanksLost: go on with the ranks that are left, under new numbers.

        Raises:
            RanksLost: the server is lost, or the MPI cannot do it.
        """

    @abstractmethod
    def finalize(self) -> None:
        """All ranks: wait for each other for the last time, so that no exit status ends a rank that still works.

        Nothing can be exchanged after that.
        """

    @abstractmethod
    def leave(self) -> None:
        """All ranks: wait for each other, and give up what the exchange holds; the process goes on."""

    @abstractmethod
    def abort(self, status: int) -> None:
        """End every rank of the job with this status, now."""

    def _look_for_failure(self) -> None:
        if self._failure is not None:
            error, self._failure = self._failure, None
            raise error

    def _refuse_when_stopped(self, command: Command) -> None:
        if command.op in INTERRUPTIBLE and self.stop:
            raise Halt

    def _deliver(self, note: Note) -> None:
        """Server: a note about a checkpoint has arrived."""
        assert note.kind in (NoteKind.SAVED, NoteKind.ALL_SAVED)
        self.on_saved(note)
