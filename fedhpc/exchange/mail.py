"""Small notes between the server and each worker, at any time: who is alive and doing what, who was asked to stop."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fedhpc.exchange.base import LONGEST_GAP_S
from fedhpc.exchange.messages import NOTE, Note, NoteKind
from fedhpc.job.stopping import StopRequest

BEAT_S = 5.0
BEATS_PER_TIMEOUT = 5
NOTES = 0
"""Tag of the notes."""


class Mail:
    """One rank's; the server's goes to every worker, a worker's to the server."""

    def __init__(
        self,
        mpi: Any,
        comm: Any,
        hosts: Sequence[str],
        stop: StopRequest,
        *,
        deliver: Callable[[Note], None],
        ring: Callable[[int], None],
    ) -> None:
        """Of a communicator.

        Args:
            mpi: mpi4py's module.
            comm: the communicator; no other message of it has the tag NOTES.
            hosts: of its ranks.
            stop: this rank's; the server's is told of others.
            deliver: takes the notes that are about something else.
            ring: wakes a rank.
        """
        self._mpi, self._comm, self._hosts, self._stop = mpi, comm, hosts, stop
        self._deliver, self._ring = deliver, ring
        self.outbox: deque[Note] = deque()
        """To be sent; any thread may add to it."""
        self.activity = "setting up"
        """What this rank says that it is doing."""
        self.halted = False
        """Worker: whether the server said so."""
        self._stop_told = False
        self._under_way: list[tuple[Any, np.ndarray]] = []
        peers = [0] if comm.rank else range(1, comm.size)
        self._silence = dict.fromkeys(peers, 0.0)
        """Seconds of our own waking time since a peer was last heard."""
        self._doing = dict.fromkeys(peers, "starting")
        self._last_look = time.monotonic()
        self._since_beat = 0.0

    def exchange(self, timeout_s: float) -> None:
        """Send what is due, read what has come.

        Raises:
            TimeoutError: a peer has not been heard of for so long.
        """
        now = time.monotonic()
        passed, self._last_look = now - self._last_look, now
        self._since_beat += passed
        self._silence = {peer: silent + min(passed, LONGEST_GAP_S) for peer, silent in self._silence.items()}
        self._under_way = [(request, buffer) for request, buffer in self._under_way if not request.Test()]
        self._read()
        if self._stop and not self._stop_told:
            self._stop_told = True
            self._send(self._word_of_the_stop())
        while self.outbox:
            self._send(self.outbox.popleft())
        if self._since_beat >= min(BEAT_S, timeout_s / BEATS_PER_TIMEOUT) and not self._under_way:
            self._since_beat = 0.0
            self._send(Note(kind=NoteKind.BEAT, text=self.activity))
        for peer, silent in self._silence.items():
            if silent > timeout_s:
                raise TimeoutError(
                    f"rank {peer} on {self._hosts[peer]} has not been heard of for {silent:.0f} s "
                    f"(exchange.timeout_s: {timeout_s:g}); last known: {self._doing[peer]}"
                )

    def _word_of_the_stop(self) -> Note:
        rank = self._comm.rank
        if rank == 0:
            return Note(kind=NoteKind.HALT)
        text = f"{self._stop.reason} at rank {rank} ({self._hosts[rank]})"
        return Note(kind=NoteKind.STOP_REQUESTED, text=text, seconds=time.monotonic() - self._stop.since)

    def _read(self) -> None:
        status = self._mpi.Status()
        while self._comm.Iprobe(source=self._mpi.ANY_SOURCE, tag=NOTES, status=status):
            packed = np.zeros(1, NOTE)
            self._comm.Recv([packed, self._mpi.BYTE], source=status.source, tag=NOTES)
            note = Note.unpacked(packed)
            self._silence[status.source] = 0.0
            if note.kind == NoteKind.BEAT:
                self._doing[status.source] = note.text
            elif note.kind == NoteKind.STOP_REQUESTED:
                self._stop.ask(note.text, note.seconds)
            elif note.kind == NoteKind.HALT:
                self.halted = True
            else:
                self._deliver(note)

    def _send(self, note: Note) -> None:
        packed = note.packed()
        for peer in self._silence:
            self._under_way.append((self._comm.Isend([packed, self._mpi.BYTE], dest=peer, tag=NOTES), packed))
            self._ring(peer)
