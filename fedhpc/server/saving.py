"""The server's checkpoints: begun between two rounds, written beside the next one's local work."""

import queue
import time
from collections.abc import Mapping
from dataclasses import replace

from fedhpc.checkpoint.control_variates import ControlVariates
from fedhpc.checkpoint.files import Checksums, Position, device_checksums, newer
from fedhpc.checkpoint.state_file import RunState, server_file
from fedhpc.checkpoint.store import Checkpoints
from fedhpc.exchange import LONGEST_GAP_S, Exchange
from fedhpc.exchange.messages import NO_RECORD, Command, Note, NoteKind, Op
from fedhpc.job.background import Background
from fedhpc.job.lock import RunLock
from fedhpc.job.run_files import RunFiles
from fedhpc.methods.updates import Vector
from fedhpc.server.job import Job

POLL_S = 0.002


class CheckpointWriter:
    """Writes a run's checkpoints, and keeps the devices' control variates that are part of them."""

    def __init__(self, job: Job, exchange: Exchange, checkpoints: Checkpoints, lock: RunLock) -> None:
        self.job, self.exchange, self.checkpoints, self.lock = job, exchange, checkpoints, lock
        self.generation = 0
        self.newest: Position | None = None
        """Position of the checkpoint that was last written, is being written or was resumed from."""
        self.control = ControlVariates(checkpoints, job.tuning, {})
        self.bytes_written = 0
        self._device_files: Checksums = {}
        self._notes: queue.SimpleQueue[Note | None] = queue.SimpleQueue()
        """What the workers have noted; None: no more will come."""
        self._writing = Background(exchange.fail)
        self._silence = 0.0
        exchange.on_saved = self._hear

    def go_on_from(self, state: RunState) -> None:
        """The run continues from this state's checkpoint."""
        self.generation, self.newest = state.generation, Position.of(state)
        self._device_files = self.checkpoints.device_files(self.newest)
        self.control = ControlVariates(self.checkpoints, self.job.tuning, self._device_files)

    def save(self, state: RunState, *, in_round: bool = False) -> RunState:
        """Begin a checkpoint, after the one before is in place; the state with its number.

        What is in memory now is what will be written: nothing of it is changed in place.
        """
        self.wait()
        self.generation += 1
        state = replace(state, generation=self.generation, part=self.generation if in_round else 0)
        position = Position.of(state)
        if position == self.newest:  # resumed from it, and at most evaluated since
            return state
        self.lock.check()
        after, self.newest = self.newest, position
        self.checkpoints.begin()
        command = Command(op=Op.SAVE, round=position.round, generation=self.generation, layers=state.layers)
        self.exchange.request(command, NO_RECORD, [0] * self.exchange.num_workers)
        fresh, devices = dict(self.control.fresh), self.control.devices()
        self._writing.start(lambda: self._write(state, fresh, devices, after))
        return state

    def save_at_stop(self, state: RunState, *, in_round: bool) -> int:
        """Save unless that state is saved already, and see it on disk; the bytes written."""
        self.wait()
        before = self.bytes_written
        if in_round or Position.of(state) != self.newest:
            self.save(state, in_round=in_round)
            self.wait()
        return self.bytes_written - before

    def wait(self) -> None:
        """Wait until the checkpoint under way is in place; raises what went wrong with it.

        Raises:
            TimeoutError: nobody has finished a file of it for `exchange.timeout_s`.
        """
        self._silence, before = 0.0, time.monotonic()
        while self._writing.busy:
            self.exchange.progress()
            time.sleep(POLL_S)
            now = time.monotonic()
            self._silence, before = self._silence + min(now - before, LONGEST_GAP_S), now
            if self._silence > self.exchange.timeout_s:
                raise TimeoutError(
                    f"no file of the checkpoint under way was finished within exchange.timeout_s: "
                    f"{self.exchange.timeout_s:g} s; a file system may hang"
                )
        self.exchange.progress()

    def _hear(self, note: Note) -> None:
        self._silence = 0.0
        self._notes.put(note)

    def _check_lock(self) -> None:
        self._silence = 0.0  # whoever asks has written something
        self.lock.check()

    def abandon(self) -> None:
        """Give up the checkpoint under way if ranks are missing in it."""
        self.give_up_waiting()
        self._writing.finish()

    def give_up_waiting(self) -> None:
        """Nobody will finish a file of the checkpoint under way any more."""
        self._notes.put(None)

    def _write(self, state: RunState, fresh: Mapping[int, Vector], devices: list[int], after: Position | None) -> None:
        position, keep = Position.of(state), self.job.config.checkpoint.keep
        sums: Checksums = {}
        for name, sha256 in self.control.write(
            fresh, generation=state.generation, round_index=position.round, layers=state.layers
        ):
            sums[name], self._silence = sha256, 0.0
        server = server_file(state, self.job.tuning, self.job.identity, devices)
        waiting_for = self.exchange.num_workers
        while waiting_for:
            note = self._notes.get()
            if note is None:
                return
            if note.kind == NoteKind.ALL_SAVED:
                waiting_for -= 1
            else:
                sums[note.text] = note.sha256
        RunFiles(self.job.config.run_dir).force_metrics()  # a run that goes on from here adds to these lines
        written = device_checksums(sums)
        self.control.note_files(written)
        self.bytes_written += len(server) + sum((self.checkpoints.partial / name).stat().st_size for name in sums)
        self._device_files = newer(self._device_files, written)
        self._check_lock()
        self.checkpoints.commit(
            position, server, {**sums, **self._device_files}, after=after, keep=keep, check_lock=self._check_lock
        )
        self.control.forget(fresh)
