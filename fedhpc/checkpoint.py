"""Checkpoints: written whole or not at all, verified before they are trusted.

A checkpoint is a folder `checkpoints/round_XXXXXX` with server.h5, one devices_RRRR.h5 per device rank, and SHA256SUMS
over all of them (`sha256sum -c` reads it). It is written under a temporary name and renamed once everything is on disk.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedhpc.errors import CheckpointError
from fedhpc.files import fsync
from fedhpc.local_update import DeviceState
from fedhpc.state_file import (
    Layouts,
    RunState,
    read_device_states,
    read_server_state,
    write_device_states,
    write_server_state,
)

SUMS = "SHA256SUMS"
SERVER_FILE = "server.h5"


class Checkpoints:
    """The checkpoints of a run directory."""

    def __init__(self, run_dir: str | Path) -> None:
        self.folder = Path(run_dir) / "checkpoints"

    def rounds(self) -> list[int]:
        """Rounds that have a checkpoint, whole or not, newest first."""
        names = [path.name.removeprefix("round_") for path in self.folder.glob("round_*")]
        return sorted((int(name) for name in names if name.isdigit()), reverse=True)

    def path(self, round_index: int) -> Path:
        """Where the checkpoint of a round is, or would be."""
        return self.folder / f"round_{round_index:06d}"

    def begin(self, round_index: int) -> None:
        """Server: make room for a checkpoint; nothing of it counts before :meth:`commit`."""
        partial = _partial(self.path(round_index))
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    def save_devices(
        self, round_index: int, rank: int, states: Mapping[int, DeviceState], layouts: Layouts, layers: tuple[int, ...]
    ) -> str:
        """Device rank: write its file into the checkpoint under way; its SHA-256."""
        path = _partial(self.path(round_index)) / device_file(rank)
        write_device_states(path, round_index, states, layouts.local(layers))
        return file_sha256(path)

    def commit(
        self, state: RunState, layouts: Layouts, identity: Mapping[str, Any], device_sums: Mapping[str, str], keep: int
    ) -> None:
        """Server: write server.h5 and the checksums, put the checkpoint in place, drop the oldest generations.

        LATEST is for people and scripts; what counts when a run resumes is :meth:`newest`.
        """
        final = self.path(state.server.round)
        partial = _partial(final)
        write_server_state(partial / SERVER_FILE, state, layouts, identity)
        sums = {**device_sums, SERVER_FILE: file_sha256(partial / SERVER_FILE)}
        _write_text(partial / SUMS, "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())))
        fsync(partial)
        # The run went on from the newest whole checkpoint, so what is as new as this one is broken.
        for broken in (found for found in self.rounds() if found >= state.server.round):
            shutil.rmtree(self.path(broken))
        partial.rename(final)
        fsync(self.folder)
        _write_text(self.folder / "LATEST", f"{final.name}\n")
        fsync(self.folder)
        for old in self.rounds()[keep:]:
            shutil.rmtree(self.path(old))

    def newest(
        self, layouts: Layouts, *, check: Callable[[dict[str, Any]], None], report: Callable[[str], None]
    ) -> RunState | None:
        """The newest whole checkpoint; broken newer ones are reported.

        Args:
            layouts: the run's tuning.
            check: gets the identity of the run that wrote the checkpoint; raises if it is not ours.
            report: gets a line about every broken checkpoint.

        Raises:
            CheckpointError: if there are checkpoints but none is whole.
        """
        problems = []
        for round_index in self.rounds():
            try:
                verify(self.path(round_index))
                return read_server_state(self.path(round_index) / SERVER_FILE, layouts, check)
            except CheckpointError as error:
                problems.append(str(error))
                report(f"checkpoint not used: {error}")
        if problems:
            raise CheckpointError(
                f"{self.folder}: no checkpoint is whole: " + "; ".join(problems) + "; to start anew, choose another "
                "run_dir or remove this folder"
            )
        return None

    def load_devices(
        self, round_index: int, wanted: set[int], layouts: Layouts, layers: tuple[int, ...]
    ) -> dict[int, DeviceState]:
        """Device rank: the states of its devices, whichever ranks wrote them."""
        states: dict[int, DeviceState] = {}
        for path in sorted(self.path(round_index).glob("devices_*.h5")):
            states |= read_device_states(path, wanted, layouts.local(layers))
        return states


def verify(folder: Path) -> None:
    """Raise CheckpointError unless every file of a checkpoint is whole and unaltered."""
    try:
        lines = (folder / SUMS).read_text(encoding="ascii").splitlines()
        sums = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: is not complete: {SUMS} cannot be read ({error})") from None
    found = {path.name for path in folder.iterdir()} - {SUMS}
    if SERVER_FILE not in sums or found != set(sums):
        odd = ", ".join(sorted(found ^ {*sums, SERVER_FILE}))
        raise CheckpointError(f"{folder}: its files are not those that {SUMS} names: {odd}")
    for name, digest in sums.items():
        path = folder / name
        if path.is_symlink() or not path.is_file():
            raise CheckpointError(f"{path}: is not a plain file")
        if file_sha256(path) != digest:
            raise CheckpointError(f"{path}: is truncated or altered: its SHA-256 is not the one in {SUMS}")


def device_file(rank: int) -> str:
    """Name of a device rank's file."""
    return f"devices_{rank:04d}.h5"


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _partial(path: Path) -> Path:
    return path.with_suffix(".partial")


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(text, encoding="ascii")
    fsync(temporary)
    os.replace(temporary, path)
