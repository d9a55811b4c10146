"""The run's state as HDF5: every tensor a checksummed dataset under the name that its layout gives it, no pickle."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import h5py
import numpy as np

import fedhpc
from fedhpc.errors import CheckpointError, UserError
from fedhpc.files import fsync
from fedhpc.local_update import DeviceState
from fedhpc.methods import ServerState
from fedhpc.updates import Layout

FORMAT = "fedhpc-checkpoint"
VERSION = 1
CHUNK_ELEMENTS = 1 << 20
FOLDERS = {"params": "", "control_global": "control/global"}
"""Where a server vector is stored, if not under its own name; the parameters are `prompts` and `params/...`."""


class Layouts(Protocol):
    """What a reader must know of the tuning."""

    def exchanged(self, layers: tuple[int, ...]) -> Layout:
        """Layout of what crosses the network."""

    def local(self, layers: tuple[int, ...]) -> Layout:
        """Layout of what stays on a device."""


@dataclass(frozen=True, kw_only=True)
class RunState:
    """All that the server needs to go on."""

    server: ServerState
    layers: tuple[int, ...]
    """S, the exchanged layers."""
    selected: bool = True
    """False during the warm-up of `ratio: auto`."""
    ratio: float = 1.0
    scores: np.ndarray | None = None
    """Layer scores, float64 [L], where the selection used them."""
    unseen_local: np.ndarray
    """Local vector of a device before its first round."""
    update_norms: tuple[float, ...] = field(default=())
    """|P^{t+1} - P^t| of every round so far."""


def write_server_state(path: Path, state: RunState, layouts: Layouts, identity: Mapping[str, Any]) -> None:
    """Write server.h5; ``identity`` is the configuration that determines the run's numbers."""
    server, exchanged = state.server, layouts.exchanged(state.layers)
    with _create(path) as file:
        file.attrs.update(
            format=FORMAT,
            version=VERSION,
            round=server.round,
            seed=identity["seed"],
            method=identity["server.method"],
            variant=identity["server.variant"] or "",
            config_sha256=identity["sha256"],
            config=json.dumps(identity, sort_keys=True),
            fedhpc_version=fedhpc.__version__,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            selected=state.selected,
            vectors=json.dumps(sorted(server.vectors)),
            scalars=json.dumps(server.scalars, sort_keys=True),
        )
        for name, vector in {"params": server.params, **server.vectors}.items():
            write_vector(file, FOLDERS.get(name, name), vector, exchanged)
        if server.control:
            devices = sorted(server.control)
            write_vector(file, "control/devices", np.stack([server.control[d] for d in devices]), exchanged)
            _write(file, "control/device_ids", np.array(devices, np.int64))
        write_vector(file, "unseen_local", state.unseen_local, layouts.local(state.layers))
        _write(file, "selection/layers", np.array(state.layers, np.int64)).attrs["ratio"] = state.ratio
        if state.scores is not None:
            _write(file, "selection/scores", state.scores).attrs["ratio"] = state.ratio
        if "prompts" in file:
            file["prompts"].attrs["layers"] = state.layers
        _write(file, "history/update_norm", np.array(state.update_norms, np.float64))


def read_server_state(path: Path, layouts: Layouts, check: Callable[[dict[str, Any]], None]) -> RunState:
    """The run's state, after ``check`` has seen the identity of the run that wrote it."""
    with open_state(path) as file:
        check(json.loads(file.attrs["config"]))
        layers = tuple(int(layer) for layer in file["selection/layers"][:])
        exchanged = layouts.exchanged(layers)
        control: dict[int, np.ndarray] = {}
        if "control/device_ids" in file:
            ids = file["control/device_ids"][:].tolist()
            control = dict(zip(ids, _read_vector(file, "control/devices", exchanged, (len(ids),)), strict=True))
        vectors = {
            name: _read_vector(file, FOLDERS.get(name, name), exchanged) for name in json.loads(file.attrs["vectors"])
        }
        return RunState(
            server=ServerState(
                round=int(file.attrs["round"]),
                params=_read_vector(file, FOLDERS["params"], exchanged),
                vectors=vectors,
                control=control,
                scalars=json.loads(file.attrs["scalars"]),
            ),
            layers=layers,
            selected=bool(file.attrs["selected"]),
            ratio=float(file["selection/layers"].attrs["ratio"]),
            scores=file["selection/scores"][:] if "selection/scores" in file else None,
            unseen_local=_read_vector(file, "unseen_local", layouts.local(layers)),
            update_norms=tuple(file["history/update_norm"][:].tolist()),
        )


def write_device_states(path: Path, round_index: int, states: Mapping[int, DeviceState], local: Layout) -> None:
    """Write one rank's device states: group `devices/<id>` for each device that has taken a step."""
    with _create(path) as file:
        file.attrs.update(format=FORMAT, version=VERSION, round=round_index)
        group = file.create_group("devices")
        for device, state in sorted(states.items()):
            entry = group.create_group(str(device))
            entry.attrs["steps_taken"] = state.steps_taken
            write_vector(entry, "local", state.local, local)
            for name, moment in (state.moments or {}).items():
                _write(entry, f"optimizer/{name}", moment)


def read_device_states(path: Path, wanted: set[int], local: Layout) -> dict[int, DeviceState]:
    """The wanted devices' states among those in a file."""
    with open_state(path) as file:
        states = {}
        for name, entry in file["devices"].items():
            if int(name) in wanted:
                moments = {key: np.asarray(entry["optimizer"][key][()]) for key in entry.get("optimizer", ())}
                states[int(name)] = DeviceState(
                    local=_read_vector(entry, "local", local),
                    steps_taken=int(entry.attrs["steps_taken"]),
                    moments=moments or None,
                )
        return states


@contextmanager
def open_state(path: Path) -> Iterator[h5py.File]:
    """A state file for reading; whatever is wrong with it becomes one CheckpointError."""
    try:
        with h5py.File(path, "r") as file:
            if file.attrs.get("format") != FORMAT:
                raise CheckpointError(f"{path}: is HDF5, but not a fedhpc checkpoint")
            if (version := int(file.attrs.get("version", 0))) > VERSION:
                raise CheckpointError(f"{path}: has format version {version}; this fedhpc reads up to {VERSION}")
            yield file
    except UserError:
        raise
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: cannot be read as a checkpoint: {error}") from None


@contextmanager
def _create(path: Path) -> Iterator[h5py.File]:
    with h5py.File(path, "w") as file:
        yield file
    fsync(path)


def _dataset(folder: str, tensor: str) -> str:
    """`prompts` are stored under the vector's own name, other tensors beside it under params/."""
    if tensor == "prompts":
        return {"": "prompts", "local": "local_prompts", "unseen_local": "unseen_local_prompts"}.get(folder, folder)
    return f"{folder}_params/{tensor}".removeprefix("_")


def write_vector(group: h5py.Group, folder: str, vector: np.ndarray, layout: Layout) -> None:
    """Write the tensors of a vector [..., n] as datasets named after ``folder``."""
    for tensor, view in layout.views(vector).items():
        _write(group, _dataset(folder, tensor), view)


def _read_vector(group: h5py.Group, folder: str, layout: Layout, lead: tuple[int, ...] = ()) -> np.ndarray:
    vector = np.empty((*lead, layout.size), np.float32)
    for tensor, view in layout.views(vector).items():
        dataset = group[_dataset(folder, tensor)]
        if dataset.shape != view.shape:
            raise CheckpointError(f"{group.file.filename}: {dataset.name} has shape {dataset.shape}, not {view.shape}")
        view[...] = dataset[()]
    return vector


def _write(group: h5py.Group, name: str, array: np.ndarray) -> h5py.Dataset:
    """A dataset with Fletcher-32 checksums; HDF5 checksums chunks, and there is no chunk in nothing or a scalar."""
    if not array.size or not array.ndim:
        return group.create_dataset(name, data=array)
    rows = max(1, CHUNK_ELEMENTS // max(1, array[0].size))
    chunks = (min(rows, len(array)), *array.shape[1:])
    return group.create_dataset(name, data=array, chunks=chunks, fletcher32=True)
