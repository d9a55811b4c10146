"""What crosses ranks: commands from the server, fixed records back. No pickle; every byte has a declared place."""

from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np

from fedhpc.updates import Vector

MAX_LAYERS = 256


class Op(IntEnum):
    """What the server asks of the workers."""

    STOP = 0
    SCORE = 1
    """Score the layers on every device; reply `score_record`."""
    SELECT = 2
    """These layers are exchanged from now on; the payload is the local vector of a device not seen before."""
    RESTORE = 3
    """Read the device states of this round's checkpoint."""
    TRAIN = 4
    """Local updates of the round's sampled devices from the payload P^t; reply `upload_record`."""
    RATIO = 5
    """Lossless ratio of the round's sampled devices at the payload P^t; reply `ratio_record`."""
    EVALUATE = 6
    """Evaluate the payload P^t; reply `evaluation_record`."""
    SAVE = 7
    """Write the device states of this round's checkpoint; reply `saved_record`."""


HEADER = np.dtype(
    [("op", "<i8"), ("round", "<i8"), ("payload_size", "<i8"), ("num_layers", "<i8"), ("layers", "u1", (32,))]
)
"""The fixed part of a command, 64 bytes; `layers` is a bit mask."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """One request of the server to all workers."""

    op: Op
    round: int = 0
    layers: tuple[int, ...] = ()
    payload: Vector = field(default_factory=lambda: np.empty(0, np.float32))

    def header(self) -> np.ndarray:
        """The header, shape [1]."""
        mask = np.zeros(MAX_LAYERS, np.uint8)
        mask[list(self.layers)] = 1
        header = np.zeros(1, HEADER)
        header[0] = (self.op, self.round, self.payload.size, len(self.layers), np.packbits(mask))
        return header

    @classmethod
    def from_header(cls, header: np.ndarray, payload: Vector) -> "Command":
        """The command whose header and payload have arrived."""
        (op, round_index, _, _, mask) = header[0]
        layers = tuple(int(layer) for layer in np.flatnonzero(np.unpackbits(mask)))
        return cls(op=Op(int(op)), round=int(round_index), layers=layers, payload=payload)


NO_RECORD = np.dtype([])


def upload_record(size: int) -> np.dtype:
    """A device's upload: 64 bytes of header, then its exchanged vector of ``size`` floats."""
    return np.dtype(
        [
            ("device", "<i8"),
            ("num_examples", "<i8"),
            ("num_steps", "<i8"),
            ("loss", "<f8"),
            ("seconds", "<f8"),
            ("unused", "<i8", (3,)),
            ("params", "<f4", (size,)),
        ]
    )


UPLOAD_HEADER_BYTES = upload_record(0).itemsize


def score_record(num_layers: int) -> np.dtype:
    """A device's layer scores."""
    return np.dtype([("device", "<i8"), ("num_examples", "<i8"), ("scores", "<f8", (num_layers,))])


def ratio_record() -> np.dtype:
    """A device's lossless ratio."""
    return np.dtype([("device", "<i8"), ("num_examples", "<i8"), ("ratio", "<f8")])


def evaluation_record(num_classes: int) -> np.dtype:
    """A worker's sums of confusion matrices (rows true, columns predicted)."""
    matrix = (num_classes, num_classes)
    return np.dtype([("personal", "<i8", matrix), ("global", "<i8", matrix)])


def saved_record() -> np.dtype:
    """The device file that a worker wrote."""
    return np.dtype([("rank", "<i8"), ("sha256", "S64")])
