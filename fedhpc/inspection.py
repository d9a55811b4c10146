"""`fedhpc inspect`: a run directory or a checkpoint in words."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np

from fedhpc.checkpoint import SERVER_FILE, Checkpoints, verify
from fedhpc.errors import CheckpointError
from fedhpc.report import RunFiles, human_bytes
from fedhpc.state_file import open_state


def inspect_text(path_text: str) -> tuple[str, bool]:
    """Words about a path, and whether a valid checkpoint is there.

    Raises:
        CheckpointError: the path is nothing that can be inspected.
    """
    path = Path(path_text)
    if path.is_file() and path.suffix == ".h5":
        return "\n".join(_state(path)), True
    if path.is_dir() and (path / SERVER_FILE).exists():
        return _checkpoint(path)
    if path.is_dir() and ((path / "checkpoints").is_dir() or (path / "config.yaml").exists()):
        return _run(path)
    found = "no such file or folder" if not path.exists() else "neither a run directory nor a checkpoint"
    raise CheckpointError(
        f"{path}: {found}; give a run directory, a checkpoint folder round_XXXXXX, or an .h5 file of one"
    )


def _run(path: Path) -> tuple[str, bool]:
    lines = [f"run directory {path}"]
    if records := RunFiles(path).read_metrics():
        evaluated = [record for record in records if record["accuracy"] is not None]
        moved = sum(record["bytes_down"] + record["bytes_up"] for record in records)
        lines.append(f"metrics: {len(records)} rounds recorded, {human_bytes(moved)} moved between ranks")
        if evaluated:
            last = evaluated[-1]
            lines.append(
                f"after round {last['round'] + 1}: accuracy {last['accuracy']:.4f}, "
                f"global {last['accuracy_global']:.4f}"
            )
    checkpoints = Checkpoints(path)
    parts = [_checkpoint(checkpoints.path(round_index)) for round_index in checkpoints.rounds()]
    if not parts:
        lines.append("no checkpoint")
    return "\n".join([*lines, *(text for text, _ in parts)]), any(valid for _, valid in parts)


def _checkpoint(folder: Path) -> tuple[str, bool]:
    try:
        verify(folder)
        lines = [f"checkpoint {folder}: valid", *(f"  {line}" for line in _state(folder / SERVER_FILE))]
    except CheckpointError as error:
        return f"checkpoint {folder}: NOT VALID: {error}", False
    files = sorted(folder.glob("*.h5"))
    size = sum(file.stat().st_size for file in files)
    return "\n".join([*lines, f"  {len(files)} files, {human_bytes(size)}"]), True


def _state(path: Path) -> Iterator[str]:
    with open_state(path) as file:
        if "devices" in file:
            yield f"devices' states after round {file.attrs['round']}"
            for name, entry in sorted(file["devices"].items(), key=lambda item: int(item[0])):
                yield f"device {name}: {entry.attrs['steps_taken']} steps taken"
            return
        attributes = file.attrs
        method = f"{attributes['method']} {attributes['variant']}".strip()
        yield f"round {attributes['round']} completed, {method}, seed {attributes['seed']}"
        yield f"written {attributes['created']} by fedhpc {attributes['fedhpc_version']}"
        layers = file["selection/layers"]
        yield f"exchanged layers {layers[:].tolist()} (ratio {layers.attrs['ratio']:.3g})"
        if "selection/scores" in file:
            scores = file["selection/scores"][:]
            yield "layer scores " + " ".join(f"{layer}:{score:.4g}" for layer, score in enumerate(scores))
        yield from _tensors(file)
        seen = len(file["control/device_ids"]) if "control/device_ids" in file else 0
        yield f"control variates of {seen} devices"


def _tensors(file: h5py.File) -> Iterator[str]:
    names = [name for name in ("prompts", "momentum", "previous_delta", "control/global") if name in file]
    names += [f"params/{name}" for name in file.get("params", ())]
    for name in names:
        array = file[name][()]
        norm = float(np.linalg.norm(array.astype(np.float64)))
        digest = hashlib.sha256(array.tobytes()).hexdigest()
        yield f"{name} {list(array.shape)}: norm {norm:.6g}, sha256 {digest}"
