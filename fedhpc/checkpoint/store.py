"""Checkpoints: written whole or not at all, verified before they are trusted.

A checkpoint is a folder `checkpoints/round_XXXXXX`, or `round_XXXXXX_part_GGGGGG` within a round. It has the server's
file and, within a round, one progress file per device rank. What is kept for each device has files of its own under
`control/` and `local/`, written anew only for devices that took part since the checkpoint before; all that belongs to
a checkpoint is listed with its SHA-256 in SHA256SUMS (`sha256sum -c` reads it), which COMPLETE seals.
"""

import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from fedhpc.checkpoint.device_state import DeviceState
from fedhpc.checkpoint.files import (
    CHECKSUMS_FILE,
    CONTROL,
    DAMAGE,
    DEVICE_FILE,
    LOCAL,
    SEAL,
    SERVER_FILE,
    CheckpointFiles,
    Checksums,
    Position,
    device_checksums,
    files_of,
    read_checksums,
    read_verified,
    sha256_of,
    verify,
)
from fedhpc.checkpoint.state_file import (
    RoundProgress,
    RunState,
    local_file,
    progress_file,
    read_local_file,
    read_progress_file,
    read_server_file,
)
from fedhpc.errors import CheckpointError
from fedhpc.exchange.messages import Note, NoteKind
from fedhpc.files import fsync, names_in, write_whole
from fedhpc.job.log import log
from fedhpc.methods.updates import Vector
from fedhpc.tuning import Tuning

DROPPED = "dropped"


class Checkpoints(CheckpointFiles):
    """The checkpoints of a run directory, and what is in them."""

    @property
    def partial(self) -> Path:
        """Where a checkpoint is written before it gets its name."""
        return self.folder / "partial"

    def begin(self) -> None:
        """Server: make room for a checkpoint; nothing of it counts before `commit`."""
        shutil.rmtree(self.partial, ignore_errors=True)
        for folder in (self.partial, self.folder / CONTROL, self.folder / LOCAL):
            folder.mkdir(parents=True, exist_ok=True)

    def save_devices(
        self,
        states: Mapping[int, DeviceState],
        progress: RoundProgress | None,
        *,
        generation: int,
        round_index: int,
        rank: int,
        layers: tuple[int, ...],
        tuning: Tuning,
        post: Callable[[Note], None],
    ) -> None:
        """Device rank: write what its devices need, a note to the server for every file."""
        for device, state in states.items():
            data = local_file(state, round_index, layers, tuning)
            name, sha256 = self.write_device_file(LOCAL, device, generation, data)
            post(Note(kind=NoteKind.SAVED, text=name, sha256=sha256))
        fsync(self.folder / LOCAL)
        if progress:
            name = f"progress_{rank:04d}.h5"
            data = progress_file(progress)
            write_whole(self.partial / name, data)
            post(Note(kind=NoteKind.SAVED, text=name, sha256=sha256_of(data)))
        post(Note(kind=NoteKind.ALL_SAVED))

    def write_device_file(self, kind: str, device: int, generation: int, data: bytes) -> tuple[str, str]:
        """Write a file of control/ or local/; its name as in the checkpoint's list, and SHA-256."""
        name = f"{kind}/{device:06d}_{generation:06d}.h5"
        write_whole(self.folder / name, data)
        return f"../{name}", sha256_of(data)

    def commit(
        self,
        position: Position,
        server: bytes,
        sums: Checksums,
        *,
        after: Position | None,
        keep: int,
        check_lock: Callable[[], None],
    ) -> None:
        """Server: put the checkpoint in place once all its other files are on disk; drop the oldest generations.

        The run went on from the checkpoint ``after``, so any newer one is broken, and goes.
        LATEST is for people and scripts; what counts when a run resumes is `newest`.
        """
        final, partial = self.path(position), self.partial
        write_whole(partial / SERVER_FILE, server)
        text = "".join(f"{sha}  {name}\n" for name, sha in sorted({**sums, SERVER_FILE: sha256_of(server)}.items()))
        write_whole(partial / CHECKSUMS_FILE, text.encode())
        write_whole(partial / SEAL, f"{sha256_of(text.encode())}  {CHECKSUMS_FILE}\n".encode())
        fsync(self.folder / CONTROL)
        fsync(partial)
        check_lock()  # writing may have hung until the directory was another run's
        later = [found for found in self.positions() if after is None or found > after]
        if later and after is None:
            raise RuntimeError(f"{self.folder}: has checkpoints that were not there when this run began")
        for broken in later:
            self._remove(broken)
        partial.rename(final)
        fsync(self.folder)
        write_whole(self.folder / "LATEST", f"{final.name}\n".encode())
        fsync(self.folder)
        check_lock()
        self._drop(self.positions()[keep:])

    def newest(
        self,
        tuning: Tuning,
        *,
        check: Callable[[dict[str, Any]], None],
        report: Callable[[str], None],
        beat: Callable[[], None] = lambda: None,
        needs: Callable[[str], bool] = lambda name: True,
    ) -> RunState | None:
        """The newest whole checkpoint; broken newer ones are reported.

        Args:
            tuning: the run's.
            check: gets the identity of the run that wrote the checkpoint; raises if it is not ours.
            report: gets a line about every broken checkpoint.
            beat: called while files are read.
            needs: whether a file of a checkpoint has to be whole.

        Raises:
            CheckpointError: if there are checkpoints but none is whole.
        """
        return self.undisturbed(lambda: self._newest(tuning, check, report, beat, needs))

    def _newest(
        self,
        tuning: Tuning,
        check: Callable[[dict[str, Any]], None],
        report: Callable[[str], None],
        beat: Callable[[], None],
        needs: Callable[[str], bool],
    ) -> RunState | None:
        problems = []
        for position in self.positions():
            folder = self.path(position)
            try:
                verify(folder, beat, needs)
                path = folder / SERVER_FILE
                state = read_server_file(path.read_bytes(), str(path), tuning, check)
                if Position.of(state) != position:
                    raise CheckpointError(f"{folder}: holds the state of {Position.of(state)}, not what its name says")
                return state
            except (CheckpointError, *DAMAGE) as error:
                problems.append(str(error))
                report(f"checkpoint not used: {error}")
        if problems:
            raise CheckpointError(
                f"{self.folder}: no checkpoint is whole: " + "; ".join(problems) + "; restore what is named from a "
                f"backup, or to start anew choose another run_dir or remove this folder. Where a {SERVER_FILE} is "
                "whole, fedhpc export and predict still have the global parameters"
            )
        return None

    def load_devices(
        self, position: Position, wanted: set[int], tuning: Tuning, layers: tuple[int, ...], unseen_local: Vector
    ) -> tuple[dict[int, DeviceState], RoundProgress]:
        """Device rank: the states of its devices and what they have done of a round under way."""
        states = self.load_states(position, wanted, tuning, layers, unseen_local)
        progress, folder = RoundProgress(round=position.round), self.path(position)
        for name, sha256 in read_checksums(folder).items():
            if name != SERVER_FILE and not DEVICE_FILE.fullmatch(name):
                found = read_progress_file(read_verified(folder / name, sha256), str(folder / name), tuning)
                progress.finished.update((d, record) for d, record in found.finished.items() if d in wanted)
                progress.unfinished.update((d, update) for d, update in found.unfinished.items() if d in wanted)
        return states, progress

    def load_states(
        self, position: Position, wanted: set[int], tuning: Tuning, layers: tuple[int, ...], unseen_local: Vector
    ) -> dict[int, DeviceState]:
        """What these devices keep, of those that have been seen."""
        states, folder = {}, self.path(position)
        for device, (name, sha256) in files_of(read_checksums(folder), LOCAL).items():
            if device in wanted:
                data = read_verified(folder / name, sha256)
                states[device] = read_local_file(data, str(folder / name), layers, tuning, unseen_local)
        return states

    def device_files(self, position: Position) -> Checksums:
        """The files of control/ and local/ that belong to a checkpoint."""
        return device_checksums(read_checksums(self.path(position)))

    def _drop(self, positions: list[Position]) -> None:
        """Remove checkpoints, and the device files that no other one lists."""
        for position in positions:
            _discard(partial(self._remove, position))
        try:
            kept = {name for position in self.positions() for name in self.device_files(position)}
        except CheckpointError:  # nobody knows which files it needs
            return
        for kind in (CONTROL, LOCAL):
            for name in names_in(self.folder / kind):
                if f"../{kind}/{name}" not in kept:
                    _discard(partial(_remove, self.folder / kind / name))

    def _remove(self, position: Position) -> None:
        """Remove a checkpoint; for whoever reads beside us, it leaves the list before any of its files is missing."""
        dropped = self.folder / DROPPED
        shutil.rmtree(dropped, ignore_errors=True)
        dropped.mkdir(exist_ok=True)
        self.path(position).rename(dropped / str(position))
        _remove(dropped)


def _discard(remove: Callable[[], None]) -> None:
    """Remove what nobody needs any more; that it cannot be done is no reason to end a run."""
    try:
        remove()
    except OSError as error:
        log.warning("%s cannot be removed: %s", error.filename, error.strerror)


def _remove(path: Path) -> None:
    """A folder with all in it, a file, or a link but not what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
