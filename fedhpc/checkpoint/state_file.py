"""The run's state as HDF5: every tensor a checksummed dataset under the name that its layout gives it, no pickle.

Files are made and read in memory, so that what is written, hashed and parsed are the same bytes.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import h5py
import numpy as np

import fedhpc
from fedhpc.checkpoint.device_state import FISHER, DeviceState, UnfinishedUpdate
from fedhpc.checkpoint.plain_hdf5 import FORMAT, VERSION, open_state
from fedhpc.errors import CheckpointError
from fedhpc.exchange import messages
from fedhpc.job.run_files import is_record
from fedhpc.methods import ServerState
from fedhpc.methods.updates import Layout, Vector
from fedhpc.tuning import Tuning

CHUNK_ELEMENTS = 1 << 20
UPLOAD_FACTS = ("num_examples", "num_steps", "loss", "seconds", "fault", "norm")
ADAM_PARTS = ("exp_avg", "exp_avg_sq", "step")
FOLDERS = {"params": "", "control_global": "control/global"}
"""Where a server vector is stored, if not under its own name; the parameters are `prompts` and `params/...`."""


@dataclass(frozen=True, kw_only=True)
class RunState:
    """All that the server needs to go on, but for the devices' control variates, which have files of their own."""

    server: ServerState
    layers: tuple[int, ...]
    """S, the exchanged layers."""
    selected: bool = True
    """False during the warm-up of `ratio: auto`."""
    pack: int = 1
    """N of `device.pack`; with `auto`, what was measured to be best when the run began."""
    ratio: float = 1.0
    scores: np.ndarray | None = None
    """Layer scores, float64 [L], where the selection used them."""
    unseen_local: np.ndarray
    """Local vector of a device before its first round."""
    added: Mapping[str, np.ndarray] = field(default_factory=dict)
    """What was added to the frozen weights [L, out, in] so far, by module."""
    update_norms: tuple[float, ...] = field(default=())
    """|P^{t+1} - P^t| of every round so far."""
    record: Mapping[str, Any] | None = None
    """Metrics of the latest round; not evaluated yet where the run was stopped before."""
    generation: int = 0
    """Checkpoints written before and with this state."""
    part: int = 0
    """0 between two rounds; within a round, the generation of the checkpoint that the state is from."""


@dataclass(frozen=True, kw_only=True)
class RoundProgress:
    """What a worker has done of the round under way."""

    round: int
    finished: dict[int, np.ndarray] = field(default_factory=dict)
    """Device -> its upload record."""
    unfinished: dict[int, UnfinishedUpdate] = field(default_factory=dict)

    def check(self, words: tuple[int, ...], *, with_moments: bool) -> None:
        """Raise CheckpointError unless uploads have this shape, and updates Adam's moments if there are any."""
        odd = [device for device, upload in self.finished.items() if upload.shape != words]
        odd += [device for device, update in self.unfinished.items() if with_moments > bool(update.moments)]
        if odd:
            raise CheckpointError(f"round {self.round}: what was saved of devices {odd} does not fit the configuration")


def server_file(state: RunState, tuning: Tuning, identity: Mapping[str, Any], devices: Sequence[int]) -> bytes:
    """server.h5.

    Args:
        identity: the configuration that determines the run's numbers.
        devices: those with a control variate.
    """
    server, exchanged = state.server, tuning.exchanged(state.layers)
    with _create(state.server.round) as file:
        file.attrs.update(
            part=state.part,
            generation=state.generation,
            seed=identity["seed"],
            method=identity["server.method"],
            variant=identity.get("server.variant") or "",
            config_sha256=identity["sha256"],
            config=json.dumps(identity, sort_keys=True),
            fedhpc_version=fedhpc.__version__,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            selected=state.selected,
            pack=state.pack,
            vectors=json.dumps(sorted(server.vectors)),
            scalars=json.dumps(server.scalars, sort_keys=True),
        )
        for name, vector in {"params": server.params, **server.vectors}.items():
            write_vector(file, FOLDERS.get(name, name), vector, exchanged)
        _write(file, "control/device_ids", np.array(devices, np.int64))
        write_vector(file, "unseen_local", state.unseen_local, tuning.local(state.layers))
        _write_tensors(file, "added", state.added)
        _write(file, "selection/layers", np.array(state.layers, np.int64)).attrs["ratio"] = state.ratio
        if state.scores is not None:
            _write(file, "selection/scores", state.scores).attrs["ratio"] = state.ratio
        if "prompts" in file:
            file["prompts"].attrs["layers"] = state.layers
        _write(file, "history/update_norm", np.array(state.update_norms, np.float64))
        if state.record is not None:
            _write(file, "history/record", np.frombuffer(json.dumps(dict(state.record)).encode(), np.uint8))
        return image(file)


def read_server_file(data: bytes, name: str, tuning: Tuning, check: Callable[[dict[str, Any]], None]) -> RunState:
    """The run's state, after ``check`` has seen the identity of the run that wrote it; ``name`` is for messages."""
    with open_state(data, name) as file:
        check(dict(json.loads(file.attrs["config"])))
        layers = _layers(_read(file, "selection/layers", np.int64), tuning)
        exchanged = tuning.exchanged(layers)
        vectors = {
            name: _read_vector(file, FOLDERS.get(name, name), exchanged) for name in json.loads(file.attrs["vectors"])
        }
        scored = "selection/scores" in file
        return RunState(
            server=ServerState(
                round=int(file.attrs["round"]),
                params=_finite(_read_vector(file, FOLDERS["params"], exchanged), "the parameters"),
                vectors=vectors,
                scalars={name: _number(scalar) for name, scalar in json.loads(file.attrs["scalars"]).items()},
            ),
            layers=layers,
            selected=bool(file.attrs["selected"]),
            pack=int(file.attrs["pack"]),
            ratio=float(file["selection/layers"].attrs["ratio"]),
            scores=_read(file, "selection/scores", np.float64, (tuning.shape.num_layers,)) if scored else None,
            unseen_local=_finite(_read_vector(file, "unseen_local", tuning.local(layers)), "local parameters"),
            added=_read_added(file, tuning),
            update_norms=tuple(_read(file, "history/update_norm", np.float64).tolist()),
            record=_record(_read(file, "history/record", np.uint8).tobytes()) if "history/record" in file else None,
            generation=int(file.attrs["generation"]),
            part=int(file.attrs["part"]),
        )


def control_file(vector: Vector, round_index: int, layers: Sequence[int], tuning: Tuning) -> bytes:
    """The control variate of one device."""
    with _create(round_index) as file:
        file.attrs["layers"] = layers
        write_vector(file, "control", vector, tuning.exchanged(layers))
        return image(file)


def read_control_file(data: bytes, name: str, tuning: Tuning) -> tuple[Vector, tuple[int, ...]]:
    """A device's control variate and the layers that were exchanged when it was written."""
    with open_state(data, name) as file:
        layers = _layers(file.attrs["layers"], tuning)
        return _read_vector(file, "control", tuning.exchanged(layers)), layers


def local_file(state: DeviceState, round_index: int, layers: Sequence[int], tuning: Tuning) -> bytes:
    """What one device keeps between its rounds."""
    with _create(round_index) as file:
        file.attrs.update(layers=layers, steps_taken=state.steps_taken, kept=json.dumps(sorted(state.kept)))
        file.attrs["has_fisher"] = state.fisher is not None
        write_vector(file, "local", state.local, tuning.local(layers))
        for name, vector in state.kept.items():
            write_vector(file, name, vector, tuning.exchanged(layers))
        if state.fisher is not None:
            write_vector(file, "fisher", state.fisher, tuning.local(layers))
        if state.traces is not None:
            _write(file, "traces", state.traces)
        _write_tensors(file, "optimizer", state.moments or {})
        return image(file)


def read_local_file(
    data: bytes, name: str, layers: tuple[int, ...], tuning: Tuning, unseen_local: Vector
) -> DeviceState:
    """A device's state; it starts with ``unseen_local`` if other layers were exchanged when it was written."""
    with open_state(data, name) as file:
        written_for = _layers(file.attrs["layers"], tuning)
        kept = {
            name: _read_vector(file, name, tuning.exchanged(written_for)) for name in json.loads(file.attrs["kept"])
        }
        state = DeviceState(
            local=_finite(_read_vector(file, "local", tuning.local(written_for)), "its parameters"),
            steps_taken=int(file.attrs["steps_taken"]),
            moments=_read_moments(file, tuning) or None,
            fisher=_read_vector(file, "fisher", tuning.local(written_for)) if file.attrs["has_fisher"] else None,
            traces=_read(file, "traces", np.float64) if "traces" in file else None,
            kept=kept,
        )
    return state if written_for == layers else state.narrowed(tuning.kept_elements(layers), unseen_local)


def progress_file(progress: RoundProgress) -> bytes:
    """One worker's part of a round under way: finished uploads and local updates between two of their steps."""
    with _create(progress.round) as file:
        finished, unfinished = file.create_group("finished"), file.create_group("unfinished")
        for device, record in progress.finished.items():
            entry = finished.create_group(str(device))
            (header,) = messages.upload_headers(record[None])
            for key in UPLOAD_FACTS:
                entry.attrs[key] = header[key]
            _write(entry, "upload", record[messages.UPLOAD_HEADER_FLOATS :])
        for device, update in progress.unfinished.items():
            entry = unfinished.create_group(str(device))
            _write(entry, "losses", update.losses)
            _write_tensors(entry, "params", update.tensors)
            _write_tensors(entry, "optimizer", update.moments)
        return image(file)


def read_progress_file(data: bytes, name: str, tuning: Tuning) -> RoundProgress:
    """See `progress_file`."""
    with open_state(data, name) as file:
        progress = RoundProgress(round=int(file.attrs["round"]))
        for device, entry in file["finished"].items():
            payload = _read(entry, "upload", np.float32)
            record = messages.upload_record(payload.size).zeros(1)
            (header,) = messages.upload_headers(record)
            header["device"] = int(device)
            for key in UPLOAD_FACTS:
                header[key] = entry.attrs[key]
            record[0, messages.UPLOAD_HEADER_FLOATS :] = payload
            progress.finished[int(device)] = record[0]
        for device, entry in file["unfinished"].items():
            progress.unfinished[int(device)] = UnfinishedUpdate(
                tensors={
                    tensor: _read(entry, f"params/{tensor}", np.float32, shape)
                    for tensor, shape in tuning.shapes.items()
                },
                moments=_read_moments(entry, tuning),
                losses=_read(entry, "losses", np.float32),
            )
        return progress


def write_vector(group: h5py.Group, folder: str, vector: np.ndarray, layout: Layout) -> None:
    """Write the tensors of a vector [..., n] as datasets named after ``folder``."""
    for tensor, view in layout.views(vector).items():
        _write(group, _dataset(folder, tensor), view)


@contextmanager
def _create(round_index: int) -> Iterator[h5py.File]:
    with h5py.File.in_memory() as file:
        file.attrs.update(format=FORMAT, version=VERSION, round=round_index)
        yield file


def image(file: h5py.File) -> bytes:
    """The bytes of a file in memory."""
    file.flush()
    content: bytes = file.id.get_file_image()
    return content


def _dataset(folder: str, tensor: str) -> str:
    """`prompts` are stored under the vector's own name, other tensors beside it under params/."""
    if tensor == "prompts":
        return {"": "prompts", "local": "local_prompts", "unseen_local": "unseen_local_prompts"}.get(folder, folder)
    return f"{folder}_params/{tensor}".removeprefix("_")


def _layers(numbers: Iterable[Any], tuning: Tuning) -> tuple[int, ...]:
    given, count = np.asarray(numbers).tolist(), tuning.shape.num_layers
    layers = [layer for layer in range(count) if layer in given]
    if given != layers:
        raise ValueError(f"exchanged layers {given} are not ascending numbers from 0 to {count - 1}")
    return tuple(layers)


def _record(text: bytes) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(text)
    if not is_record(record) or "loss" not in record or "idle" not in record.get("seconds", ()):
        raise ValueError("history/record is not a round's line of the metrics")
    return record


def _number(value: Any) -> float:
    if not isinstance(value, int | float):
        raise ValueError(f"{value!r:.100} is found where a number belongs")
    return value


def _finite(vector: Vector, what: str) -> Vector:
    """What devices train on: the run that wrote it had no other numbers there."""
    if not np.isfinite(vector).all():
        raise ValueError(f"{what} are not finite")
    return vector


def _read_vector(group: h5py.Group, folder: str, layout: Layout) -> Vector:
    vector = np.empty(layout.size, np.float32)
    for tensor, view in layout.views(vector).items():
        view[...] = _read(group, _dataset(folder, tensor), np.float32, view.shape)
    return vector


def _read_added(file: h5py.File, tuning: Tuning) -> dict[str, np.ndarray]:
    shapes = tuning.added_layout.shapes
    found = {name: _read(file, f"added/{name}", np.float32, shapes[name]) for name in file.get("added", ())}
    return {name: _finite(weight, "the added weights") for name, weight in found.items()}


def _read(group: h5py.Group, name: str, dtype: type, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """A dataset of this type and shape, or of any length."""
    dataset = group[name]
    wanted = np.dtype(dtype), (dataset.size,) if shape is None else shape
    if (dataset.dtype, dataset.shape) != wanted:
        raise ValueError(f"{dataset.name} is {dataset.dtype} {dataset.shape}, not {wanted[0]} {wanted[1]}")
    return np.asarray(dataset[()])


def _write_tensors(group: h5py.Group, folder: str, tensors: Mapping[str, np.ndarray]) -> None:
    for name, tensor in tensors.items():
        _write(group, f"{folder}/{name}", tensor)


def _read_moments(group: h5py.Group, tuning: Tuning) -> dict[str, np.ndarray]:
    """`<tensor>.<part>` of all tensors or of none; fisher is there or not."""
    found = {}
    for name in group.get("optimizer", ()):
        tensor, _, part = name.rpartition(".")
        found[name] = _read(group, f"optimizer/{name}", np.float32, () if part == "step" else tuning.shapes[tensor])
    adam = {name for name in found if not name.endswith(FISHER)}
    if adam and adam != {f"{tensor}.{part}" for tensor in tuning.shapes for part in ADAM_PARTS}:
        raise ValueError(f"{group.name}: optimizer has not the moments of all tensors")
    return found


def _write(group: h5py.Group, name: str, array: np.ndarray) -> h5py.Dataset:
    """A dataset with Fletcher-32 checksums; HDF5 checksums chunks, and there is no chunk in nothing or a scalar."""
    if not array.size or not array.ndim:
        return group.create_dataset(name, data=array)
    rows = max(1, CHUNK_ELEMENTS // max(1, array[0].size))
    chunks = (min(rows, len(array)), *array.shape[1:])
    return group.create_dataset(name, data=array, chunks=chunks, fletcher32=True)
