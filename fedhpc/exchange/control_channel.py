"""Small notes between the server and each worker, at any time: who is alive and doing what, who was asked to stop."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fedhpc.exchange.base import LONGEST_GAP_S
from fedhpc.exchange.messages import NOTE, Note, NoteKind, Tag
from fedhpc.job.status import RankStatus
from fedhpc.job.stopping import StopRequest

HEARTBEAT_S = 5.0
HEARTBEATS_PER_TIMEOUT = 5


class ControlChannel:
    """One rank's end: the server's notes go to every worker, a worker's to the server."""

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
        """Begin with nothing sent or received.

        Args:
            mpi: mpi4py's module.
            comm: a communicator, none of whose other messages has the tag of notes.
            hosts: the host of each of its ranks.
            stop: this rank's request; a request at the server is passed on to all workers, a worker's to the server.
            deliver: takes the notes about checkpoints.
            ring: wakes the rank of this number.
        """
        self._mpi, self._comm, self._hosts, self._stop = mpi, comm, hosts, stop
        self._deliver, self._ring = deliver, ring
        self.outgoing: deque[Note] = deque()
        """Notes to be sent; any thread may add to it."""
        self.activity = "setting up"
        """What this rank says that it is doing."""
        self.halted = False
        """Worker: whether the server has sent HALT."""
        self._stop_told = False
        self._sending: list[tuple[Any, np.ndarray]] = []
        peers = [0] if comm.rank else range(1, comm.size)
        self._silence = dict.fromkeys(peers, 0.0)
        """Seconds that this rank was awake since it last heard of a peer."""
        self._activities = dict.fromkeys(peers, "starting")
        self._last_progress = time.monotonic()
        self._since_heartbeat = 0.0

    def progress(self, timeout_s: float) -> None:
        """Send the notes that are due, and read those that have arrived.

        Raises:
            TimeoutError: a peer has not been heard of for so long.
        """
        now = time.monotonic()
        passed, self._last_progress = now - self._last_progress, now
        self._since_heartbeat += passed
        self._silence = {peer: silent + min(passed, LONGEST_GAP_S) for peer, silent in self._silence.items()}
        self._sending = [(request, buffer) for request, buffer in self._sending if not request.Test()]
        self._read()
        if self._stop and not self._stop_told:
            self._stop_told = True
            self._send(self._stop_note())
        while self.outgoing:
            self._send(self.outgoing.popleft())
        if self._since_heartbeat >= min(HEARTBEAT_S, timeout_s / HEARTBEATS_PER_TIMEOUT) and not self._sending:
            self._since_heartbeat = 0.0
            self._send(Note(kind=NoteKind.BEAT, text=self.activity))
        for peer, silent in self._silence.items():
            if silent > timeout_s:
                raise TimeoutError(
                    f"rank {peer} on {self._hosts[peer]} has not been heard of for {silent:.0f} s "
                    f"(exchange.timeout_s: {timeout_s:g}); last known: {self._activities[peer]}"
                )

    def heard(self) -> list[RankStatus]:
        """At the server: itself, and what it has heard of each worker; from any thread, so without a call of MPI."""
        silence = {0: time.monotonic() - self._last_progress, **self._silence}
        activities = {0: self.activity, **self._activities}
        return [
            RankStatus(rank=rank, host=self._hosts[rank], doing=doing, silent_s=silence[rank])
            for rank, doing in activities.items()
        ]

    def _stop_note(self) -> Note:
        rank = self._comm.rank
        if rank == 0:
            return Note(kind=NoteKind.HALT)
        text = f"{self._stop.reason} at rank {rank} ({self._hosts[rank]})"
        return Note(kind=NoteKind.STOP_REQUESTED, text=text, seconds=time.monotonic() - self._stop.since)

    def _read(self) -> None:
        status = self._mpi.Status()
        while self._comm.Iprobe(source=self._mpi.ANY_SOURCE, tag=Tag.NOTE, status=status):
            packed = np.zeros(1, NOTE)
            self._comm.Recv([packed, self._mpi.BYTE], source=status.source, tag=Tag.NOTE)
            note = Note.unpacked(packed)
            self._silence[status.source] = 0.0
            if note.kind == NoteKind.BEAT:
                self._activities[status.source] = note.text
            elif note.kind == NoteKind.STOP_REQUESTED:
                self._stop.ask(note.text, note.seconds)
            elif note.kind == NoteKind.HALT:
                self.halted = True
            else:
                self._deliver(note)

    def _send(self, note: Note) -> None:
        packed = note.packed()
        for peer in self._silence:
            self._sending.append((self._comm.Isend([packed, self._mpi.BYTE], dest=peer, tag=Tag.NOTE), packed))
            self._ring(peer)
