"""The serial twin: one process is server and worker."""

import os
import time
from collections.abc import Callable, Sequence

import numpy as np

from fedhpc.errors import Halt, UserError
from fedhpc.exchange.base import DEFAULT_TIMEOUT_S, Exchange, Traffic
from fedhpc.exchange.exact_sum import SumSize
from fedhpc.exchange.messages import Command, Note, RecordType
from fedhpc.job.background import settle
from fedhpc.job.status import RankStatus
from fedhpc.job.stopping import StopRequest
from fedhpc.job.tracker import any_at_work

LONGEST_WRITE_S = 10.0
"""A failed process waits at most so long for what it is writing."""


class LocalExchange(Exchange):
    """One process: the server's commands go straight to the worker."""

    def __init__(self, stop: StopRequest, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        super().__init__(stop, timeout_s)
        self.rank, self.size, self.local_rank, self.ranks_here, self.num_workers = 0, 1, 0, 1, 1
        self.handler: Callable[[Command], np.ndarray | None] | None = None
        self._activity, self._last_progress = "setting up", time.monotonic()

    def request(
        self, command: Command, record: RecordType, counts: Sequence[int], *, summed: SumSize | None = None
    ) -> np.ndarray:
        """See `Exchange`."""
        assert self.handler is not None
        self._activity = f"{command.op.name.lower()}, round {command.round}"
        self.progress()
        self._refuse_when_stopped(command)
        start = time.perf_counter()
        records = self.handler(command)
        if records is None:
            raise Halt
        if summed:
            assert self._terms is not None
            self.exponent = self._terms.exponent
            self.sums = self._terms.fixed(self.exponent)
        self.traffic = Traffic(seconds={"broadcast": 0.0, "local": time.perf_counter() - start, "gather": 0.0})
        return records

    def beat(self, activity: str) -> None:
        """See `Exchange`."""
        self._activity = activity
        self.progress()
        if self.stop:
            raise Halt

    def progress(self) -> None:
        """See `Exchange`."""
        self._last_progress = time.monotonic()
        self._look_for_failure()

    def heard(self) -> list[RankStatus]:
        """See `Exchange`."""
        silent = time.monotonic() - self._last_progress
        return [RankStatus(rank=0, host=self.host, doing=self._activity, silent_s=silent)]

    def post(self, note: Note) -> None:
        """See `Exchange`."""
        self._deliver(note)

    def move_states(self, outgoing: Sequence[tuple[int, bytes]], incoming: Sequence[int]) -> list[bytes]:
        """See `Exchange`."""
        assert not outgoing
        assert not incoming
        return []

    def agree(self, problem: str | None, digest: str) -> None:
        """See `Exchange`."""
        if problem is not None:
            raise UserError(problem)

    def repair(self) -> None:
        """See `Exchange`."""
        raise AssertionError("there is no other rank to lose")

    def finalize(self) -> None:
        """See `Exchange`."""

    def leave(self) -> None:
        """See `Exchange`."""

    def abort(self, status: int) -> None:
        """See `Exchange`; a checkpoint under way is waited for, unless its file system hangs."""
        settle(LONGEST_WRITE_S)
        if any_at_work():
            os._exit(status)
        raise SystemExit(status)
