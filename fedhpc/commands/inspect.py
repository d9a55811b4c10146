"""`fedhpc inspect`: a run directory or a checkpoint in words."""

import hashlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from fedhpc.checkpoint.files import SERVER_FILE, CheckpointFiles, read_checksums, verify
from fedhpc.checkpoint.plain_hdf5 import open_state
from fedhpc.commands.bounded import bounded
from fedhpc.errors import CheckpointError
from fedhpc.evaluate.scores import VIEWS, scores_of
from fedhpc.job.progress import human_bytes
from fedhpc.job.run_files import RunFiles

SECONDS, BYTES_PER_S = 2, 20_000_000
MEMORY, COPIES = 512 << 20, 6
"""Bounds of reading a file: processor time and memory for any, and more for a large one."""


def inspect_text(path_text: str) -> tuple[str, bool]:
    """Words about a path, and whether a valid checkpoint is there.

    Raises:
        CheckpointError: the path is nothing that can be inspected.
    """
    path = Path(path_text)
    if path.is_file() and path.suffix == ".h5":
        return "\n".join(_state(path)), True
    if path.is_dir() and (path / SERVER_FILE).exists():
        words = _checkpoint(path)
        if not path.exists():
            raise CheckpointError(f"{path}: was removed meanwhile: its run has newer checkpoints")
        return words
    if path.is_dir() and ((path / "checkpoints").is_dir() or (path / "config.yaml").exists()):
        return _run(path)
    found = "no such file or folder" if not path.exists() else "neither a run directory nor a checkpoint"
    raise CheckpointError(
        f"{path}: {found}; give a run directory, a checkpoint folder round_XXXXXX, or an .h5 file of one"
    )


def _run(path: Path) -> tuple[str, bool]:
    lines = [f"run directory {path}"]
    if records := RunFiles(path).read_metrics():
        evaluated = [record for record in records if record.get("accuracy_global") is not None]
        moved = sum(record["bytes"] for record in records)
        lines.append(f"metrics: {len(records)} rounds recorded, {human_bytes(moved)} moved between devices and server")
        if evaluated:
            lines.append(f"after round {evaluated[-1]['round'] + 1}: {scores_text(evaluated[-1])}")
    parts = _checkpoints(CheckpointFiles(path))
    if not parts:
        lines.append("no checkpoint")
    return "\n".join([*lines, *(text for text, _ in parts)]), any(valid for _, valid in parts)


def scores_text(record: Mapping[str, Any]) -> str:
    """All scores of an evaluated round."""
    texts = [
        f"{words if behind else score.title} {value:.4f}"
        for score in scores_of([record])
        for behind, words in VIEWS.items()
        if isinstance(value := record.get(score.name + behind), int | float)
    ]
    return ", ".join(texts)


def _checkpoints(checkpoints: CheckpointFiles) -> list[tuple[str, bool]]:
    """Words about those that a run beside us has not removed meanwhile."""
    while True:
        found = {position: _checkpoint(checkpoints.path(position)) for position in checkpoints.positions()}
        left = checkpoints.positions()
        if not left or any(position in found for position in left):
            return [part for position, part in found.items() if position in left]


def _checkpoint(folder: Path) -> tuple[str, bool]:
    try:
        verify(folder)
        lines = [f"checkpoint {folder}: valid", *(f"  {line}" for line in _state(folder / SERVER_FILE))]
        files = [folder / name for name in read_checksums(folder)]
        size = sum(file.stat().st_size for file in files)
    except (CheckpointError, OSError) as error:
        return f"checkpoint {folder}: NOT VALID: {error}", False
    return "\n".join([*lines, f"  {len(files)} files, {human_bytes(size)}"]), True


def _state(path: Path) -> list[str]:
    """Lines about a state file, which may be anyone's; damage can send the HDF5 library round in circles."""
    try:
        size = path.stat().st_size
        return bounded(
            lambda: "\n".join(_lines(path)),
            str(path),
            seconds=SECONDS + size // BYTES_PER_S,
            memory=MEMORY + COPIES * size,
        ).splitlines()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None


def _lines(path: Path) -> Iterator[str]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    with open_state(data, str(path)) as file:
        attributes = file.attrs
        if "selection/layers" not in file:
            yield from _device_file(file)
            return
        method = f"{attributes['method']} {attributes['variant']}".strip()
        within = ", and a part of the next one" if attributes["part"] else ""
        yield f"round {attributes['round']} completed{within}, {method}, seed {attributes['seed']}"
        yield f"written {attributes['created']} by fedhpc {attributes['fedhpc_version']}"
        layers = file["selection/layers"]
        yield f"exchanged layers {layers[:].tolist()} (ratio {layers.attrs['ratio']:.3g})"
        if "selection/scores" in file:
            scores = file["selection/scores"][:]
            yield "layer scores " + " ".join(f"{layer}:{score:.4g}" for layer, score in enumerate(scores))
        yield from _tensors(file)
        yield f"control variates of {len(file['control/device_ids'])} devices"


def _device_file(file: h5py.File) -> Iterator[str]:
    """A file of control/, local/, or of a round under way."""
    yield f"after round {file.attrs['round']}"
    if "steps_taken" in file.attrs:
        yield f"a device's own state: {file.attrs['steps_taken']} steps taken"
    elif "control" in file:
        yield "a device's control variate"
    for name, entry in file.get("finished", {}).items():
        yield f"device {name}: finished, {entry.attrs['num_steps']} steps"
    for name, entry in file.get("unfinished", {}).items():
        yield f"device {name}: {len(entry['losses'])} steps taken, unfinished"


def _tensors(file: h5py.File) -> Iterator[str]:
    names = [name for name in ("prompts", "momentum", "previous_delta", "control/global") if name in file]
    names += [f"{folder}/{name}" for folder in ("params", "added") for name in file.get(folder, ())]
    for name in names:
        array = file[name][()]
        norm = math.sqrt(np.square(array, dtype=np.float64).sum())  # by no BLAS, whose threads take memory
        digest = hashlib.sha256(array).hexdigest()
        yield f"{name} {list(array.shape)}: norm {norm:.6g}, sha256 {digest}"
