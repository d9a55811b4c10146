"""The files of checkpoints: found, and verified before they are trusted; see `fedhpc.checkpoint.store`."""

import hashlib
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import h5py

from fedhpc.checkpoint.plain_hdf5 import open_state
from fedhpc.errors import CheckpointError
from fedhpc.files import names_in

if TYPE_CHECKING:
    from fedhpc.checkpoint.state_file import RunState

CHECKSUMS_FILE = "SHA256SUMS"
SEAL = "COMPLETE"
SERVER_FILE = "server.h5"
CONTROL, LOCAL = "control", "local"
DEVICE_FILE = re.compile(rf"\.\./(({CONTROL}|{LOCAL})/\d{{6,}})_\d{{6,}}\.h5")
DAMAGE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
"""Errors that mean a damaged checkpoint. Any other OSError may be a file system's that is well again tomorrow."""
READERS = 8
"""Files read at once to verify a checkpoint: those of 10,000 devices are gigabytes."""
T = TypeVar("T")
Checksums = dict[str, str]
"""File name, relative to the checkpoint's folder -> SHA-256."""


@dataclass(frozen=True, order=True)
class Position:
    """Where in a run a checkpoint stands."""

    round: int
    """Rounds completed."""
    part: int = 0
    """The checkpoint's generation if it was made within a round, else 0."""

    def __str__(self) -> str:
        return f"round_{self.round:06d}" + (f"_part_{self.part:06d}" if self.part else "")

    @classmethod
    def parse(cls, name: str) -> "Position | None":
        """The position that a folder's name gives."""
        match = re.fullmatch(r"round_(\d{6,})(?:_part_(\d{6,}))?", name, re.ASCII)
        position = cls(int(match[1]), int(match[2] or 0)) if match else None
        return position if str(position) == name else None

    @classmethod
    def of(cls, state: "RunState") -> "Position":
        """The position of a run's state."""
        return cls(state.server.round, state.part)


class CheckpointFiles:
    """The checkpoints of a run directory, as files."""

    def __init__(self, run_dir: str | Path) -> None:
        self.folder = Path(run_dir) / "checkpoints"

    def positions(self) -> list[Position]:
        """The positions of all checkpoints, whole or not, newest first."""
        found = map(Position.parse, names_in(self.folder))
        return sorted((position for position in found if position), reverse=True)

    def path(self, position: Position) -> Path:
        """Where a checkpoint is, or would be."""
        return self.folder / str(position)

    def undisturbed(self, read: Callable[[], T]) -> T:
        """What ``read`` finds; again where it fails because a run beside us has saved and removed what it was reading.

        Raises:
            CheckpointError, OSError: from ``read``.
        """
        while True:
            before = self.positions()
            try:
                return read()
            except (CheckpointError, *DAMAGE):
                if self.positions() == before:
                    raise

    def newest_readable(self, read: Callable[[h5py.File], T]) -> T | None:
        """What ``read`` finds in the newest server's file that is whole; None if there is none."""

        def first() -> T:
            for position in self.positions():
                with suppress(CheckpointError, OSError):
                    path = self.path(position) / SERVER_FILE
                    data = read_verified(path, read_checksums(path.parent).get(SERVER_FILE, ""))
                    with open_state(data, str(path)) as file:
                        return read(file)
            raise CheckpointError(f"{self.folder}: no {SERVER_FILE} is whole")

        with suppress(CheckpointError, OSError):
            return self.undisturbed(first)
        return None


def newer(sums: Checksums, over: Checksums) -> Checksums:
    """The files of a checkpoint's devices with those that have been written since in the place of older ones."""
    written = {stem_of(name) for name in over}
    return {**{name: sha256 for name, sha256 in sums.items() if stem_of(name) not in written}, **over}


def device_checksums(sums: Checksums) -> Checksums:
    """Those of control/ and local/ among a checkpoint's files."""
    return {name: sha256 for name, sha256 in sums.items() if DEVICE_FILE.fullmatch(name)}


def files_of(sums: Checksums, kind: str) -> dict[int, tuple[str, str]]:
    """Device -> name and SHA-256 of its file among these, in control/ or local/."""
    return {device_of(name): (name, sha256) for name, sha256 in sums.items() if name.startswith(f"../{kind}/")}


def device_of(name: str) -> int:
    """The device whose file this is."""
    return int(stem_of(name).split("/")[1])


def stem_of(name: str) -> str:
    """`control/DEVICE` or `local/DEVICE` of a device's file; other files' own names."""
    match = DEVICE_FILE.fullmatch(name)
    return match[1] if match else name


def verify(
    folder: Path, beat: Callable[[], None] = lambda: None, needs: Callable[[str], bool] = lambda name: True
) -> None:
    """Raise CheckpointError unless every file needed of a checkpoint is whole and unaltered; beat after each file."""
    if folder.is_symlink():
        raise CheckpointError(f"{folder}: is a link, not a folder")
    sums = read_checksums(folder)
    own = {name for name in sums if not DEVICE_FILE.fullmatch(name)}
    found = {path.name for path in folder.iterdir()} - {CHECKSUMS_FILE, SEAL}
    if SERVER_FILE not in own or found != own:
        odd = ", ".join(sorted(found ^ {*own, SERVER_FILE}))
        raise CheckpointError(f"{folder}: its files are not those that {CHECKSUMS_FILE} names: {odd}")

    def check(name: str) -> None:
        path = _plain(folder / name)
        with path.open("rb") as stream:
            _check_sha256(path, hashlib.file_digest(stream, "sha256").hexdigest(), sums[name])

    with ThreadPoolExecutor(READERS) as pool:
        for _ in pool.map(check, filter(needs, sums)):
            beat()


def read_checksums(folder: Path) -> Checksums:
    """The files of a checkpoint, or CheckpointError if the list is not whole."""
    try:
        text, seal = (_plain(folder / name, links=True).read_text(encoding="ascii") for name in (CHECKSUMS_FILE, SEAL))
        if seal != f"{sha256_of(text.encode())}  {CHECKSUMS_FILE}\n":
            raise ValueError(f"it is not what {SEAL} seals")
        return {name: sha256 for sha256, name in (line.split("  ", 1) for line in text.splitlines())}
    except (*DAMAGE, ValueError) as error:  # CheckpointError is one
        raise CheckpointError(f"{folder}: is not complete: {CHECKSUMS_FILE} cannot be used: {error}") from None


def read_verified(path: Path, sha256: str) -> bytes:
    """A file's content, or CheckpointError unless it is a plain file with this SHA-256."""
    data = _plain(path).read_bytes()
    _check_sha256(path, sha256_of(data), sha256)
    return data


def _plain(path: Path, *, links: bool = False) -> Path:
    """The path, or CheckpointError unless a plain file is there: others may have no end."""
    if not path.is_file() or (path.is_symlink() and not links):
        raise CheckpointError(f"{path}: is {'missing' if not path.exists() else 'not a plain file'}")
    return path


def _check_sha256(path: Path, found: str, wanted: str) -> None:
    if found != wanted:
        raise CheckpointError(f"{path}: is truncated or altered: its SHA-256 is not the one in {CHECKSUMS_FILE}")


def sha256_of(data: bytes) -> str:
    """Hexadecimal SHA-256."""
    return hashlib.sha256(data).hexdigest()
