"""What a device sends of its update, and how that lies in the record which crosses the network.

The upload and its size are the encoding's alone: a new encoding is a class that says how many elements its payload has,
how a payload is made of P^t and P_i, and what the server makes of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from fedhpc.config import Config
from fedhpc.config.sections import ExchangeConfig, Part
from fedhpc.errors import ConfigError
from fedhpc.exchange.messages import FLOAT, UPLOAD_HEADER_FLOATS, RecordType, upload_record
from fedhpc.methods import Method
from fedhpc.methods.updates import Vector
from fedhpc.registry import ENCODINGS

Kept = dict[str, Vector]
"""What a device keeps of its uploads, by name; vectors [n]."""


class Encoding(Part, ABC):
    """From a local update to the payload of its upload, and back. Pure: what a device needs again it is given again."""

    Config: ClassVar[type[ExchangeConfig]] = ExchangeConfig
    dtype: np.dtype = np.dtype(np.float32)
    """Of the payload's elements."""
    num_sums = 0
    """Vectors that all devices' payloads are added up to on their way; 0: every payload goes to the server."""
    masked_among = 0
    """m, the devices of a round that mask their terms of the sums (secure aggregation); 0: they do not."""
    is_plain = False
    """Whether the payload is P_i itself."""
    keeps = False
    """Whether a device needs what it kept of its last upload."""

    def __init__(self, config: Any) -> None:
        self.config = config

    @classmethod
    def make(cls, config: Any, method: Method) -> Encoding:
        """The encoding for a run, from its whole configuration."""
        return cls(config.exchange)

    @classmethod
    def approximates(cls, config: Any) -> str | None:
        """The key and value by which the server gets less than P_i, for messages; None where it gets P_i to the bit."""
        return f"exchange.encoding: {config.encoding}"

    @classmethod
    def check(cls, config: Any) -> None:
        """See `fedhpc.config.sections.Part.check`; only what is sent whole adds up exactly on its way."""
        if config.exchange.sums_only and (found := cls.approximates(config.exchange)) is not None:
            raise ConfigError(f"{found} needs exchange.mode: gather; sums are exact")

    def length(self, size: int) -> int:
        """Elements of the payload for n exchanged floats."""
        return size

    @abstractmethod
    def encode(
        self, params: Vector, start: Vector, kept: Mapping[str, Vector], *, num_steps: int, learning_rate: float
    ) -> tuple[np.ndarray, Kept]:
        """The payload of an update from ``start`` to ``params`` [n], and what the device keeps in place of ``kept``."""

    def decode(self, payload: np.ndarray, start: Vector) -> Vector:
        """P_i [n], as far as the server knows."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Upload:
    """How uploads lie in their records: a header, the payload, and the gradient where the method asks for it."""

    size: int
    """n, exchanged floats."""
    length: int
    """Elements of the payload."""
    dtype: np.dtype
    """Of the payload."""
    with_gradient: bool
    """Whether the gradient at P^t follows, n floats."""

    @classmethod
    def of(cls, size: int, encoding: Encoding, method: Method) -> Upload:
        """Of n exchanged floats."""
        return cls(size=size, length=encoding.length(size), dtype=encoding.dtype, with_gradient=method.uploads_gradient)

    @property
    def nbytes(self) -> int:
        """Bytes beside the header."""
        return self.length * self.dtype.itemsize + self.with_gradient * self.size * FLOAT.itemsize

    @property
    def record(self) -> RecordType:
        """The record that crosses the network, in whole floats."""
        return upload_record(self._payload_floats + self.with_gradient * self.size)

    def payloads(self, records: np.ndarray) -> np.ndarray:
        """Payloads [m, length] inside upload records, sharing their memory."""
        return records[:, UPLOAD_HEADER_FLOATS:].view(self.dtype)[:, : self.length]

    def gradients(self, records: np.ndarray) -> np.ndarray:
        """Gradients [m, n] inside upload records, sharing their memory."""
        first = UPLOAD_HEADER_FLOATS + self._payload_floats
        return records[:, first : first + self.size]

    @property
    def _payload_floats(self) -> int:
        return -(-self.length * self.dtype.itemsize // FLOAT.itemsize)


def make_encoding(config: Config, method: Method) -> Encoding:
    """The encoding that a configuration's section `exchange` names."""
    encoding: Encoding = ENCODINGS[config.exchange.encoding].make(config, method)
    return encoding
