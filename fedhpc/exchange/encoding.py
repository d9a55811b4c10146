"""What a device sends of its update: the parameters, their change in 16 bits, or terms of sums."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from fedhpc.config import Config
from fedhpc.methods import Method, SummedMethod
from fedhpc.methods.updates import Vector

Kept = dict[str, Vector]
"""What a device keeps of its uploads, by name; vectors [n]."""


class Encoding(ABC):
    """From a local update to the payload of its upload, and back."""

    dtype: np.dtype = np.dtype(np.float32)
    """Of the payload's n elements."""
    num_sums = 0
    """Vectors that all devices' payloads are added up to on their way; 0: every payload goes to the server."""
    is_plain = False
    """Whether the payload is P_i itself."""
    keeps = False
    """Whether a device needs what it kept of its last upload."""

    @abstractmethod
    def encode(
        self, params: Vector, start: Vector, kept: Mapping[str, Vector], *, num_steps: int, learning_rate: float
    ) -> tuple[np.ndarray, Kept]:
        """The payload [n] of an update from ``start`` to ``params``, and what the device keeps in place of ``kept``."""

    def decode(self, payload: np.ndarray, start: Vector) -> Vector:
        """P_i [n], as far as the server knows."""
        raise NotImplementedError


class Parameters(Encoding):
    """P_i itself."""

    is_plain = True

    def encode(
        self, params: Vector, start: Vector, kept: Mapping[str, Vector], *, num_steps: int, learning_rate: float
    ) -> tuple[np.ndarray, Kept]:
        """See :class:`Encoding`."""
        return params, {}

    def decode(self, payload: np.ndarray, start: Vector) -> Vector:
        """See :class:`Encoding`."""
        return payload


class NarrowChange(Encoding):
    """P_i - P^t in 16 bits, with error feedback: what rounding took away is added to the device's next change.

    Error Feedback Fixes SignSGD and other Gradient Compression Schemes. Karimireddy, Rebjock, Stich, Jaggi. ICML 2019,
    algorithm 2.
    """

    dtype = np.dtype(np.int16)
    """The bits of 16-bit floats; NumPy knows no bfloat16."""
    keeps = True

    def __init__(self, dtype: torch.dtype) -> None:
        self._torch_dtype = dtype

    def encode(
        self, params: Vector, start: Vector, kept: Mapping[str, Vector], *, num_steps: int, learning_rate: float
    ) -> tuple[np.ndarray, Kept]:
        """See :class:`Encoding`."""
        change = params - start + kept.get("residual", np.float32(0))
        largest = torch.finfo(self._torch_dtype).max
        payload = torch.from_numpy(change).clamp(-largest, largest).to(self._torch_dtype).view(torch.int16).numpy()
        return payload, {"residual": change - self._floats(payload)}

    def decode(self, payload: np.ndarray, start: Vector) -> Vector:
        """See :class:`Encoding`."""
        return start + self._floats(payload)

    def _floats(self, payload: NDArray[np.int16]) -> Vector:
        floats: Vector = torch.from_numpy(payload).view(self._torch_dtype).float().numpy()
        return floats


class SumTerms(Encoding):
    """The device's terms of the sums that a server method needs, with the control variate held by the device."""

    def __init__(self, method: SummedMethod) -> None:
        self.method = method
        self.num_sums = 2 if method.needs_total else 1
        self.keeps = method.has_control

    def encode(
        self, params: Vector, start: Vector, kept: Mapping[str, Vector], *, num_steps: int, learning_rate: float
    ) -> tuple[np.ndarray, Kept]:
        """See :class:`Encoding`."""
        change, control = self.method.change(
            start.astype(np.float64),
            params,
            kept.get("control", np.float32(0)),
            num_steps=num_steps,
            learning_rate=learning_rate,
        )
        return change.astype(np.float32), {} if control is None else {"control": control}


def make_encoding(config: Config, method: Method) -> Encoding:
    """The encoding that `exchange.mode` and `exchange.dtype` name."""
    if config.exchange.mode == "reduce":
        assert isinstance(method, SummedMethod)  # the configuration refuses the others
        return SumTerms(method)
    if config.exchange.dtype == "float32":
        return Parameters()
    return NarrowChange(getattr(torch, config.exchange.dtype))
