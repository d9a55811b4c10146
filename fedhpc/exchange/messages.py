"""What crosses ranks: commands from the server, fixed records back. No pickle; every byte has a declared place."""

import math
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from fedhpc.federation.sampling import PROBES, Packs
from fedhpc.methods.updates import Vector
from fedhpc.selection.strategy import MAX_LAYERS


class Op(IntEnum):
    """What the server asks of the workers."""

    FINISH = 0
    """End: the run is done."""
    SCORE = 1
    """Score the layers on every device; reply `score_record`."""
    SELECT = 2
    """These layers are exchanged from now on; the payload is the local vector of a device not seen before, and what was
    added to the frozen weights so far."""
    RESTORE = 3
    """Read the device states of this round's checkpoint; `placed` is that of the round that follows it."""
    TRAIN = 4
    """Local updates of the round's packs on their workers, from the payload P^t; reply `upload_record`."""
    RATIO = 5
    """Lossless ratio of the round's sampled devices at the payload P^t; reply `ratio_record`."""
    EVALUATE = 6
    """Evaluate the payload P^t; reply a part of the sums of `fedhpc.evaluate.outcomes`."""
    SAVE = 7
    """Begin to write checkpoint `generation`; a `SAVED` note follows for every file, and `ALL_SAVED`."""
    SUSPEND = 8
    """End: the run was stopped on request, and goes on when it is started again."""
    PROBE = 9
    """Time a step of 1, 2, 4 ... up to `pack` devices side by side; reply `probe_record`."""
    GENERATE = 10
    """Answer prompts with the payload P^t; reply answers as `fedhpc.evaluate.questions` has them."""
    KEYS = 11
    """Secure aggregation, step 0: `placed` are the sampled devices; reply `secure.records.PUBLIC_KEYS`."""
    SHARES = 12
    """Step 1: the payload are all public keys, `placed` as before; reply `secure.records.boxes_record`."""
    UNMASK = 13
    """Step 3: the payload are all boxes, `placed` the devices whose masked integers have arrived; those reply
    `secure.records.answer_record`."""
    ADD = 14
    """Add products to the frozen weights; the payload are the vectors [n] with their factors."""


HEADER = np.dtype(
    [
        ("op", "<i2"),
        ("pack", "<i2"),
        ("num_placed", "<i4"),
        ("round", "<i8"),
        ("payload_size", "<i8"),
        ("generation", "<i8"),
        ("layers", "u1", (32,)),
        ("clip", "<f8"),
    ]
)
"""The fixed part of a command, 72 bytes; `layers` is a bit mask. PLACED records and the payload follow."""
PLACED = np.dtype([("device", "<i4"), ("pack", "<i4"), ("worker", "<i4")])
"""Which pack a device is in, and where that is trained; 12 bytes."""


def place_packs(packs: Packs, workers: NDArray[np.int32]) -> np.ndarray:
    """PLACED records of a round's packs, from the worker of each: shape [m], pack by pack."""
    each = enumerate(zip(packs, workers.tolist(), strict=True))
    return np.array([(device, index, worker) for index, (pack, worker) in each for device in pack], PLACED)


@dataclass(frozen=True, kw_only=True)
class Command:
    """One request of the server to all workers."""

    op: Op
    round: int = 0
    generation: int = 0
    layers: tuple[int, ...] = ()
    pack: int = 1
    """N of `device.pack`."""
    clip: float = math.inf
    """C of `privacy`."""
    placed: np.ndarray = field(default_factory=lambda: np.empty(0, PLACED))
    """PLACED records of the devices that take part in the round."""
    payload: Vector = field(default_factory=lambda: np.empty(0, np.float32))

    @property
    def nbytes(self) -> int:
        """Bytes that each worker receives."""
        return HEADER.itemsize + self.placed.nbytes + self.payload.nbytes

    def header(self) -> np.ndarray:
        """The header, shape [1]."""
        mask = np.zeros(MAX_LAYERS, np.uint8)
        mask[list(self.layers)] = 1
        header = np.zeros(1, HEADER)
        header[0] = (
            self.op,
            self.pack,
            self.placed.size,
            self.round,
            self.payload.size,
            self.generation,
            np.packbits(mask),
            self.clip,
        )
        return header

    def packs(self) -> tuple[Packs, list[int]]:
        """The round's packs, and the worker of each."""
        packs: dict[int, list[int]] = {}
        workers = {}
        for device, pack, worker in self.placed.tolist():
            packs.setdefault(pack, []).append(device)
            workers[pack] = worker
        return list(packs.values()), list(workers.values())

    @classmethod
    def from_header(cls, header: np.ndarray, placed: np.ndarray, payload: Vector) -> "Command":
        """The command whose parts have arrived."""
        (op, pack, _, round_index, _, generation, mask, clip) = header[0]
        return cls(
            op=Op(int(op)),
            pack=int(pack),
            round=int(round_index),
            generation=int(generation),
            layers=tuple(int(layer) for layer in np.flatnonzero(np.unpackbits(mask))),
            clip=float(clip),
            placed=placed,
            payload=payload,
        )


@dataclass(frozen=True)
class RecordType:
    """The fixed form of a reply: a NumPy type, repeated over a shape (one type alone ends at 2 GiB)."""

    dtype: np.dtype
    shape: tuple[int, ...] = ()

    @classmethod
    def of(cls, records: np.ndarray) -> "RecordType":
        """The form of these records [any, ...]."""
        return cls(records.dtype, records.shape[1:])

    @property
    def nbytes(self) -> int:
        """Bytes of one record."""
        return self.dtype.itemsize * math.prod(self.shape)

    def zeros(self, count: int) -> np.ndarray:
        """So many records, contiguous, filled with zeros."""
        return np.zeros((count, *self.shape), self.dtype)


NO_RECORD = RecordType(np.dtype([]))

UPLOAD_HEADER = np.dtype(
    [
        ("device", "<i8"),
        ("num_examples", "<i8"),
        ("num_steps", "<i8"),
        ("loss", "<f8"),
        ("seconds", "<f8"),
        ("fault", "<i8"),
        ("norm", "<f8"),
        ("count", "<i8"),
    ]
)
"""The fixed part of an upload, 64 bytes. `fault`: what the device's rank found (see `updates.fault_of`); `norm`: how
far a bad upload is from P^t; `count`: what it counts in sums, by `server.weights`."""
FLOAT = np.dtype("<f4")
UPLOAD_HEADER_FLOATS = UPLOAD_HEADER.itemsize // FLOAT.itemsize


def upload_record(size: int) -> RecordType:
    """A device's upload: a header, then ``size`` floats."""
    return RecordType(FLOAT, (UPLOAD_HEADER_FLOATS + size,))


def upload_headers(records: np.ndarray) -> np.ndarray:
    """Headers [m] inside upload records, sharing their memory."""
    return records[:, :UPLOAD_HEADER_FLOATS].view(UPLOAD_HEADER)[:, 0]


def upload_payloads(records: np.ndarray, size: int) -> np.ndarray:
    """Floats [m, size] behind the headers of upload records, sharing their memory."""
    return records[:, UPLOAD_HEADER_FLOATS : UPLOAD_HEADER_FLOATS + size]


def score_record(num_layers: int) -> RecordType:
    """A device's layer scores."""
    return RecordType(np.dtype([("device", "<i8"), ("num_examples", "<i8"), ("scores", "<f8", (num_layers,))]))


def ratio_record() -> RecordType:
    """A device's lossless ratio, and what it follows from."""
    found = [(name, "<f8") for name in ("ratio", "mass", "gap", "lipschitz")]
    return RecordType(np.dtype([("device", "<i8"), ("num_examples", "<i8"), *found]))


def probe_record() -> RecordType:
    """A worker's seconds for a device's step, by the binary logarithm of the devices side by side; inf: too many."""
    return RecordType(np.dtype([("seconds", "<f8", (PROBES,))]))


class Tag(IntEnum):
    """What a message between two ranks is."""

    NOTE = 0
    STATE = 1
    """A device's state, from worker to worker."""
    SUMS = 2
    COMMAND = 3
    REPLY = 4
    """A worker is done with a command."""
    RECORDS = 5
    EXPONENT = 6
    """The largest exponent of all workers' terms; each worker's own came with its reply."""


class NoteKind(IntEnum):
    """What a note is about."""

    BEAT = 0
    """From any rank: alive; the text says what it is doing."""
    STOP_REQUESTED = 1
    """To the server: a stop was requested at this rank `seconds` ago, for the reason in the text."""
    HALT = 2
    """To the workers: end what is under way at the next local step."""
    SAVED = 3
    """To the server: this file of the checkpoint is on disk, with this SHA-256."""
    ALL_SAVED = 4
    """To the server: all files of this rank are."""


NOTE = np.dtype([("kind", "<i8"), ("seconds", "<f8"), ("text", "S176"), ("sha256", "S64")])
"""A small message beside the commands, at any time; 256 bytes."""


@dataclass(frozen=True, kw_only=True)
class Note:
    """A word between ranks outside the order of the commands."""

    kind: NoteKind
    text: str = ""
    seconds: float = 0.0
    sha256: str = ""

    def packed(self) -> np.ndarray:
        """As one NOTE, shape [1]."""
        return np.array([(self.kind, self.seconds, self.text.encode(), self.sha256.encode())], NOTE)

    @classmethod
    def unpacked(cls, packed: np.ndarray) -> "Note":
        """The note that has arrived."""
        kind, seconds, text, sha256 = packed[0]
        return cls(
            kind=NoteKind(int(kind)), seconds=float(seconds), text=text.decode(errors="replace"), sha256=sha256.decode()
        )
