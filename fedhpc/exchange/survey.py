"""Questions of rank 0 to the other ranks, each with a time limit: what `fedhpc doctor` has beside a run's exchange.

A rank that does not answer in time is not asked again, and nobody waits for it.
"""

import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fedhpc.exchange.connection import Connection
from fedhpc.exchange.memory import ADDRESS
from fedhpc.exchange.messages import RecordType

TAG_QUESTION, TAG_ECHO, TAG_GATHER, TAG_ANSWER = 1, 2, 3, 4
"""Answers to question n have the tag TAG_ANSWER + n % NUM_QUESTIONS: a late one is not taken for that of another."""
NUM_QUESTIONS = 10_000
SHORTEST_SLEEP_S, LONGEST_SLEEP_S = 1e-5, 0.005
SLEEP_SHARE = 0.15
"""As a run waits: see `MpiExchange`."""
ECHO_S = 10.0
"""How long one message of `measure` may take."""
MOST_GATHERED = 1 << 28
"""Bytes that rank 0 gathers at most."""
MEMORY_BYTES = 1 << 24
ENDS = np.array([-1, -1], np.int64)
BYTES = RecordType(np.dtype(np.uint8))


class Survey:
    """One rank's end; rank 0 asks, the others `serve`. Alone, without MPI, rank 0 has nobody to ask."""

    def __init__(self, mpi: Any = None) -> None:
        """Begin with all ranks.

        Args:
            mpi: mpi4py's module, MPI initialized; None for a process of its own.
        """
        self._mpi = mpi
        self._comm: Any = mpi.COMM_WORLD if mpi else None
        self.rank: int = mpi.COMM_WORLD.rank if mpi else 0
        self.size: int = mpi.COMM_WORLD.size if mpi else 1
        self.silent: dict[int, str] = {}
        """Rank 0: the ranks that did not answer, and what they were asked."""
        self.local_rank, self.ranks_here = 0, 1
        self._number = 0
        self._sent: list[Any] = []
        self._connection: Connection | None = None

    @property
    def answering(self) -> list[int]:
        """Rank 0: the other ranks that have answered so far."""
        return [rank for rank in range(1, self.size) if rank not in self.silent]

    def ask(self, what: str, limit_s: float, ranks: Sequence[int] | None = None, **given: Any) -> dict[int, Any]:
        """Rank 0: the answers by rank of those that answer in time.

        Args:
            what: the question, `serve` gives it to its function.
            limit_s: seconds to wait for all of them.
            ranks: who is asked, all that are left unless given.
            given: goes with it, as JSON.
        """
        asked = self.answering if ranks is None else [rank for rank in ranks if rank not in self.silent]
        self._number += 1
        for rank in asked:
            self._send([what, given, self._number], rank, TAG_QUESTION)
        answers: dict[int, Any] = {}
        deadline, began = time.monotonic() + limit_s, time.monotonic()
        while len(answers) < len(asked) and time.monotonic() < deadline:
            waiting = [rank for rank in asked if rank not in answers]
            found = {rank: text for rank in waiting if (text := self._received(rank, self._answer_tag)) is not None}
            answers |= {rank: json.loads(text) for rank, text in found.items()}
            if not found:
                _rest(began)
        self.silent |= dict.fromkeys(set(asked) - answers.keys(), what)
        return dict(sorted(answers.items()))

    def serve(self, answer: Callable[[str, dict[str, Any]], Any]) -> None:
        """Another rank: answer until the question `end`.

        `waiting` is answered here: processor seconds for each second that the rank has waited for this question.
        """
        share = 0.0
        own: dict[str, Callable[..., Any]] = {
            "join": self._join,
            "memory": self._look_at_memory,
            "echo": self._echo,
            "collect": self._collect,
            "waiting": lambda: share,
        }
        while True:
            began, processor = time.monotonic(), time.process_time()
            while (text := self._received(0, TAG_QUESTION)) is None:
                _rest(began)
            what, given, self._number = json.loads(text)
            if what == "waiting":
                share = (time.process_time() - processor) / (time.monotonic() - began)
            self._send(own[what](**given) if what in own else answer(what, given), 0, self._answer_tag)
            if what == "end":
                return

    def join(self, limit_s: float) -> dict[int, dict[str, Any]]:
        """Rank 0: have all ranks find each other as a run does; for each, its place, and whether it shares memory.

        Nothing bounds this but the ranks' will: ask something else before.
        """
        return self._beside("join", limit_s, self._join)

    def share_memory(self, limit_s: float) -> dict[int, str | None]:
        """Rank 0, after `join`: fill memory that the ranks of this host share; what each of them says against it."""
        assert self._connection is not None
        memory = self._connection.memory
        memory.reserve(MEMORY_BYTES)
        memory.at(0, BYTES, MEMORY_BYTES)[:] = 7
        near = [rank for rank in self.answering if self._connection.near[rank - 1]]
        return self.ask("memory", limit_s, near, address=memory.address[0].tolist())

    def measure(self, rank: int, seconds: float, nbytes: int) -> dict[str, float]:
        """Rank 0: half a round trip in seconds, and bytes per second down to a rank and up from it.

        Args:
            rank: the peer.
            seconds: how long to measure, for the three together.
            nbytes: of one message.

        Raises:
            TimeoutError: a message takes longer than `ECHO_S`.
        """
        self._number += 1
        self._send(["echo", {}, self._number], rank, TAG_QUESTION)
        down, up = np.ones(nbytes, np.uint8), np.empty(nbytes, np.uint8)
        found = {
            "latency_s": self._best(rank, down[:0], up[:1], seconds / 3) / 2,
            "down": nbytes / self._best(rank, down, up[:1], seconds / 3),
            "up": nbytes / self._best(rank, down[:0], up, seconds / 3),
        }
        self._wait(self._comm.Isend([ENDS, self._mpi.BYTE], dest=rank, tag=TAG_ECHO))
        deadline = time.monotonic() + ECHO_S
        while self._received(rank, self._answer_tag) is None:
            if time.monotonic() > deadline:
                raise TimeoutError
        return found

    def collect(self, nbytes: int, limit_s: float) -> dict[str, float]:
        """Rank 0: seconds to broadcast so many bytes to all ranks, and to gather as many from each.

        Raises:
            TimeoutError: it comes to no end.
        """
        nbytes = min(nbytes, MOST_GATHERED // self.size)
        found: dict[str, float] = self._beside("collect", limit_s, self._collect, nbytes=nbytes)[0]
        return {**found, "nbytes": nbytes}

    def finalize(self) -> None:
        """All ranks: end MPI; only where all of them answer."""
        if self._mpi:
            self._mpi.Finalize()

    def _beside(self, what: str, limit_s: float, own: Callable[..., Any], **given: Any) -> dict[int, Any]:
        """Ask all ranks to do something that rank 0 has to do with them."""
        self._number += 1
        asked = self.answering
        for rank in asked:
            self._send([what, given, self._number], rank, TAG_QUESTION)
        answers, deadline = {0: own(**given)}, time.monotonic() + limit_s
        while len(answers) <= len(asked) and time.monotonic() < deadline:
            for rank in (rank for rank in asked if rank not in answers):
                if (text := self._received(rank, self._answer_tag)) is not None:
                    answers[rank] = json.loads(text)
        self.silent |= dict.fromkeys(set(asked) - answers.keys(), what)
        return answers

    def _join(self) -> dict[str, Any]:
        self._connection = connection = Connection(self._mpi)
        connection.join(self._comm.Dup())
        self.local_rank, self.ranks_here = connection.local_rank, connection.ranks_here
        near = connection.shares_memory if self.rank else True
        return {"local_rank": self.local_rank, "ranks_here": self.ranks_here, "near": near}

    def _look_at_memory(self, address: list[int]) -> str | None:
        assert self._connection is not None
        memory = self._connection.memory
        try:
            memory.attach(np.array([tuple(address)], ADDRESS))
            seen = memory.at(0, BYTES, address[1])
        except (OSError, ValueError) as error:
            return str(error)
        return None if (seen == 7).all() else "other bytes than rank 0 wrote"

    def _echo(self) -> None:
        sizes, buffer = np.zeros(2, np.int64), np.empty(0, np.uint8)
        while True:
            self._wait(self._comm.Irecv([sizes, self._mpi.BYTE], source=0, tag=TAG_ECHO))
            down, up = sizes.tolist()
            if down < 0:
                return
            if buffer.size < max(down, up):
                buffer = np.ones(max(down, up), np.uint8)
            if down:
                self._wait(self._comm.Irecv([buffer[:down], self._mpi.BYTE], source=0, tag=TAG_ECHO))
            self._wait(self._comm.Isend([buffer[:up], self._mpi.BYTE], dest=0, tag=TAG_ECHO))

    def _best(self, rank: int, down: np.ndarray, up: np.ndarray, seconds: float) -> float:
        """The shortest time in which these bytes go to a rank, and those come back."""
        sizes, best = np.array([down.size, up.size], np.int64), np.inf
        until = time.monotonic() + seconds
        while best == np.inf or time.monotonic() < until:
            began = time.perf_counter()
            sends = [self._comm.Isend([sizes, self._mpi.BYTE], dest=rank, tag=TAG_ECHO)]
            if down.size:
                sends.append(self._comm.Isend([down, self._mpi.BYTE], dest=rank, tag=TAG_ECHO))
            self._wait(self._comm.Irecv([up, self._mpi.BYTE], source=rank, tag=TAG_ECHO))
            best = min(best, time.perf_counter() - began)
            for request in sends:
                self._wait(request)
        return best

    def _collect(self, nbytes: int) -> dict[str, float]:
        began = time.perf_counter()
        part = np.ones(nbytes, np.uint8)
        self._wait(self._comm.Ibcast([part, self._mpi.BYTE], root=0))
        self._wait(self._comm.Ibarrier())
        sent = time.perf_counter()
        if self.rank:
            self._wait(self._comm.Isend([part, self._mpi.BYTE], dest=0, tag=TAG_GATHER))
        else:
            parts = np.empty((self.size, nbytes), np.uint8)
            whole = [
                self._comm.Irecv([parts[rank], self._mpi.BYTE], source=rank, tag=TAG_GATHER)
                for rank in range(1, self.size)
            ]
            for request in whole:
                self._wait(request)
        return {"broadcast_s": sent - began, "gather_s": time.perf_counter() - sent}

    def _wait(self, request: Any) -> None:
        deadline = time.monotonic() + ECHO_S
        while not request.Test():
            if time.monotonic() > deadline:
                raise TimeoutError
            time.sleep(0)

    @property
    def _answer_tag(self) -> int:
        return TAG_ANSWER + self._number % NUM_QUESTIONS

    def _send(self, content: Any, rank: int, tag: int) -> None:
        self._sent = [(request, data) for request, data in self._sent if not request.Test()]
        data = json.dumps(content).encode()
        self._sent.append((self._comm.Isend([data, self._mpi.BYTE], dest=rank, tag=tag), data))

    def _received(self, rank: int, tag: int) -> bytes | None:
        status = self._mpi.Status()
        if not self._comm.Iprobe(source=rank, tag=tag, status=status):
            return None
        data = bytearray(status.Get_count(self._mpi.BYTE))
        self._comm.Recv([data, self._mpi.BYTE], source=rank, tag=tag)
        return bytes(data)


def _rest(began: float) -> None:
    time.sleep(min(max(SHORTEST_SLEEP_S, SLEEP_SHARE * (time.monotonic() - began)), LONGEST_SLEEP_S))
