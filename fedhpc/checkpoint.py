"""Checkpoints: written whole or not at all, verified before they are trusted.

A checkpoint is a folder `checkpoints/round_XXXXXX`, or `round_XXXXXX_part_GGGGGG` within a round. It has the server's
file and, within a round, one progress file per device rank. What is kept for each device has files of its own under
`control/` and `local/`, written anew only for devices that took part since the checkpoint before; all that belongs to
a checkpoint is listed with its SHA-256 in SHA256SUMS (`sha256sum -c` reads it), which COMPLETE seals.
"""

import hashlib
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedhpc.errors import CheckpointError
from fedhpc.files import fsync, names_in, write_whole
from fedhpc.local_update import DeviceState
from fedhpc.messages import Kind, Note
from fedhpc.report import log
from fedhpc.state_file import (
    RoundProgress,
    RunState,
    local_file,
    progress_file,
    read_local_file,
    read_progress_file,
    read_server_file,
)
from fedhpc.tuning import Tuning
from fedhpc.updates import Vector

SUMS = "SHA256SUMS"
SEAL = "COMPLETE"
SERVER_FILE = "server.h5"
CONTROL, LOCAL = "control", "local"
DEVICE_FILE = re.compile(rf"\.\./(({CONTROL}|{LOCAL})/\d{{6,}})_\d{{6,}}\.h5")
DAMAGE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
"""Of a checkpoint. Any other OSError may be a file system's that is well again tomorrow."""
READERS = 8
"""Files read at once to verify a checkpoint: those of 10,000 devices are gigabytes."""
Sums = dict[str, str]
"""File name, relative to the checkpoint's folder -> SHA-256."""


@dataclass(frozen=True, order=True)
class Position:
    """Where in a run a checkpoint stands."""

    round: int
    """Rounds completed."""
    part: int = 0
    """Within a round: the checkpoint's generation."""

    def __str__(self) -> str:
        return f"round_{self.round:06d}" + (f"_part_{self.part:06d}" if self.part else "")

    @classmethod
    def parse(cls, name: str) -> "Position | None":
        """The position that a folder's name gives."""
        match = re.fullmatch(r"round_(\d{6,})(?:_part_(\d{6,}))?", name, re.ASCII)
        position = cls(int(match[1]), int(match[2] or 0)) if match else None
        return position if str(position) == name else None

    @classmethod
    def of(cls, state: RunState) -> "Position":
        """The position of a run's state."""
        return cls(state.server.round, state.part)


class Checkpoints:
    """The checkpoints of a run directory."""

    def __init__(self, run_dir: str | Path) -> None:
        self.folder = Path(run_dir) / "checkpoints"

    def positions(self) -> list[Position]:
        """Of all checkpoints, whole or not, newest first."""
        found = map(Position.parse, names_in(self.folder))
        return sorted((position for position in found if position), reverse=True)

    def path(self, position: Position) -> Path:
        """Where a checkpoint is, or would be."""
        return self.folder / str(position)

    @property
    def partial(self) -> Path:
        """Where a checkpoint is written before it gets its name."""
        return self.folder / "partial"

    def begin(self) -> None:
        """Server: make room for a checkpoint; nothing of it counts before :meth:`commit`."""
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
            post(Note(kind=Kind.SAVED, text=name, sha256=sha256))
        fsync(self.folder / LOCAL)
        if progress:
            name = f"progress_{rank:04d}.h5"
            data = progress_file(progress)
            write_whole(self.partial / name, data)
            post(Note(kind=Kind.SAVED, text=name, sha256=sha256_of(data)))
        post(Note(kind=Kind.ALL_SAVED))

    def write_device_file(self, kind: str, device: int, generation: int, data: bytes) -> tuple[str, str]:
        """Write a file of control/ or local/; its name as in the checkpoint's list, and SHA-256."""
        name = f"{kind}/{device:06d}_{generation:06d}.h5"
        write_whole(self.folder / name, data)
        return f"../{name}", sha256_of(data)

    def commit(
        self,
        position: Position,
        server: bytes,
        sums: Sums,
        *,
        after: Position | None,
        keep: int,
        check_lock: Callable[[], None],
    ) -> None:
        """Server: put the checkpoint in place once all its other files are on disk; drop the oldest generations.

        The run went on from the checkpoint ``after``, so any newer one is broken, and goes.
        LATEST is for people and scripts; what counts when a run resumes is :meth:`newest`.
        """
        final, partial = self.path(position), self.partial
        write_whole(partial / SERVER_FILE, server)
        text = "".join(f"{sha}  {name}\n" for name, sha in sorted({**sums, SERVER_FILE: sha256_of(server)}.items()))
        write_whole(partial / SUMS, text.encode())
        write_whole(partial / SEAL, f"{sha256_of(text.encode())}  {SUMS}\n".encode())
        fsync(self.folder / CONTROL)
        fsync(partial)
        check_lock()  # writing may have hung until the directory was another run's
        later = [found for found in self.positions() if after is None or found > after]
        if later and after is None:
            raise RuntimeError(f"{self.folder}: has checkpoints that were not there when this run began")
        for broken in later:
            _remove(self.path(broken))
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
    ) -> RunState | None:
        """The newest whole checkpoint; broken newer ones are reported.

        Args:
            tuning: the run's.
            check: gets the identity of the run that wrote the checkpoint; raises if it is not ours.
            report: gets a line about every broken checkpoint.
            beat: called while files are read.

        Raises:
            CheckpointError: if there are checkpoints but none is whole.
        """
        problems, positions = [], self.positions()
        for position in positions:
            folder = self.path(position)
            try:
                verify(folder, beat)
                path = folder / SERVER_FILE
                state = read_server_file(path.read_bytes(), str(path), tuning, check)
                if Position.of(state) != position:
                    raise CheckpointError(f"{folder}: holds the state of {Position.of(state)}, not what its name says")
                return state
            except (CheckpointError, *DAMAGE) as error:
                problems.append(str(error))
                report(f"checkpoint not used: {error}")
        if problems and self.positions() != positions:  # a run beside us has saved, and removed what we were reading
            return self.newest(tuning, check=check, report=report, beat=beat)
        if problems:
            raise CheckpointError(
                f"{self.folder}: no checkpoint is whole: " + "; ".join(problems) + "; to start anew, choose another "
                "run_dir or remove this folder"
            )
        return None

    def load_devices(
        self, position: Position, wanted: set[int], tuning: Tuning, layers: tuple[int, ...], unseen_local: Vector
    ) -> tuple[dict[int, DeviceState], RoundProgress]:
        """Device rank: the states of its devices and what they have done of a round under way."""
        folder = self.path(position)
        states: dict[int, DeviceState] = {}
        progress = RoundProgress(round=position.round)
        sums = read_sums(folder)
        for device, (name, sha256) in files_of(sums, LOCAL).items():
            if device in wanted:
                data = read_verified(folder / name, sha256)
                states[device] = read_local_file(data, name, layers, tuning, unseen_local)
        for name, sha256 in sums.items():
            if name != SERVER_FILE and not DEVICE_FILE.fullmatch(name):
                found = read_progress_file(read_verified(folder / name, sha256), name)
                progress.finished.update((d, record) for d, record in found.finished.items() if d in wanted)
                progress.unfinished.update((d, update) for d, update in found.unfinished.items() if d in wanted)
        return states, progress

    def device_files(self, position: Position) -> Sums:
        """The files of control/ and local/ that belong to a checkpoint."""
        return device_sums(read_sums(self.path(position)))

    def _drop(self, positions: list[Position]) -> None:
        """Remove checkpoints, and the device files that no other one lists."""
        for position in positions:
            _discard(self.path(position))
        try:
            kept = {name for position in self.positions() for name in self.device_files(position)}
        except CheckpointError:  # nobody knows which files it needs
            return
        for kind in (CONTROL, LOCAL):
            for name in names_in(self.folder / kind):
                if f"../{kind}/{name}" not in kept:
                    _discard(self.folder / kind / name)


def newer(sums: Sums, over: Sums) -> Sums:
    """The files of a checkpoint's devices with those that have been written since in the place of older ones."""
    written = {stem_of(name) for name in over}
    return {**{name: sha256 for name, sha256 in sums.items() if stem_of(name) not in written}, **over}


def device_sums(sums: Sums) -> Sums:
    """Those of control/ and local/ among a checkpoint's files."""
    return {name: sha256 for name, sha256 in sums.items() if DEVICE_FILE.fullmatch(name)}


def files_of(sums: Sums, kind: str) -> dict[int, tuple[str, str]]:
    """Device -> name and SHA-256 of its file among these, in control/ or local/."""
    return {device_of(name): (name, sha256) for name, sha256 in sums.items() if name.startswith(f"../{kind}/")}


def device_of(name: str) -> int:
    """The device whose file this is."""
    return int(stem_of(name).split("/")[1])


def stem_of(name: str) -> str:
    """`control/DEVICE` or `local/DEVICE` of a device's file; other files' own names."""
    match = DEVICE_FILE.fullmatch(name)
    return match[1] if match else name


def verify(folder: Path, beat: Callable[[], None] = lambda: None) -> None:
    """Raise CheckpointError unless every file of a checkpoint is whole and unaltered; beat after each file."""
    if folder.is_symlink():
        raise CheckpointError(f"{folder}: is a link, not a folder")
    sums = read_sums(folder)
    own = {name for name in sums if not DEVICE_FILE.fullmatch(name)}
    found = {path.name for path in folder.iterdir()} - {SUMS, SEAL}
    if SERVER_FILE not in own or found != own:
        odd = ", ".join(sorted(found ^ {*own, SERVER_FILE}))
        raise CheckpointError(f"{folder}: its files are not those that {SUMS} names: {odd}")

    def check(name: str, sha256: str) -> None:  # keeps nothing of what it reads
        read_verified(folder / name, sha256)

    with ThreadPoolExecutor(READERS) as pool:
        for _ in pool.map(check, sums, sums.values()):
            beat()


def read_sums(folder: Path) -> Sums:
    """The files of a checkpoint, or CheckpointError if the list is not whole."""
    try:
        text, seal = (folder / SUMS).read_text(encoding="ascii"), (folder / SEAL).read_text(encoding="ascii")
        if seal != f"{sha256_of(text.encode())}  {SUMS}\n":
            raise ValueError(f"it is not what {SEAL} seals")
        return {name: sha256 for sha256, name in (line.split("  ", 1) for line in text.splitlines())}
    except (*DAMAGE, ValueError) as error:
        raise CheckpointError(f"{folder}: is not complete: {SUMS} cannot be used: {error}") from None


def read_verified(path: Path, sha256: str) -> bytes:
    """A file's content, or CheckpointError unless it is a plain file with this SHA-256."""
    if path.is_symlink() or not path.is_file():
        raise CheckpointError(f"{path}: is {'missing' if not path.exists() else 'not a plain file'}")
    data = path.read_bytes()
    if sha256_of(data) != sha256:
        raise CheckpointError(f"{path}: is truncated or altered: its SHA-256 is not the one in {SUMS}")
    return data


def sha256_of(data: bytes) -> str:
    """Hexadecimal SHA-256."""
    return hashlib.sha256(data).hexdigest()


def _discard(path: Path) -> None:
    """Remove what nobody needs any more; that it cannot be done is no reason to end a run."""
    try:
        _remove(path)
    except OSError as error:
        log.warning("%s cannot be removed: %s", path, error.strerror)


def _remove(path: Path) -> None:
    """A folder with all in it, a file, or a link but not what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
