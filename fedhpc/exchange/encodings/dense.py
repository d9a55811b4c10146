"""The whole update: the parameters, their change in 16 bits, or terms of sums."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedhpc.config.sections import ExchangeConfig
from fedhpc.exchange.encoding import Encoding, Kept
from fedhpc.job.deferred import torch
from fedhpc.methods import Method, SummedMethod
from fedhpc.methods.updates import Vector
from fedhpc.registry import ENCODINGS


class Parameters(Encoding):
    """P_i itself."""

    is_plain = True

    def encode(
        self, params: Vector, start: Vector, kept: Mapping[str, Vector], *, num_steps: int, learning_rate: float
    ) -> tuple[np.ndarray, Kept]:
        """See `Encoding`."""
        return params, {}

    def decode(self, payload: np.ndarray, start: Vector) -> Vector:
        """See `Encoding`."""
        return payload


class NarrowChange(Encoding):
    """P_i - P^t in 16 bits, with error feedback: what rounding took away is added to the device's next change.

    Error Feedback Fixes SignSGD and other Gradient Compression Schemes. Karimireddy, Rebjock, Stich, Jaggi. ICML 2019,
    algorithm 2.
    """

    dtype = np.dtype(np.int16)
    """The bits of 16-bit floats; NumPy knows no bfloat16."""
    keeps = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._torch_dtype = getattr(torch, config.dtype)

    def encode(
        self, params: Vector, start: Vector, kept: Mapping[str, Vector], *, num_steps: int, learning_rate: float
    ) -> tuple[np.ndarray, Kept]:
        """See `Encoding`."""
        change = params - start + kept.get("residual", np.float32(0))
        largest = torch.finfo(self._torch_dtype).max
        payload = torch.from_numpy(change).clamp(-largest, largest).to(self._torch_dtype).view(torch.int16).numpy()
        return payload, {"residual": change - self._floats(payload)}

    def decode(self, payload: np.ndarray, start: Vector) -> Vector:
        """See `Encoding`."""
        return start + self._floats(payload)

    def _floats(self, payload: NDArray[np.int16]) -> Vector:
        floats: Vector = torch.from_numpy(payload).view(self._torch_dtype).float().numpy()
        return floats


class SumTerms(Encoding):
    """The device's terms of the sums that a server method needs, with the control variate held by the device.

    Args:
        masked_among: devices of a round among whom uploads are masked; 0: they are not.
        num_facts: numbers that the device adds behind its vector.
    """

    def __init__(self, config: Any, method: SummedMethod, masked_among: int, num_facts: int) -> None:
        super().__init__(config)
        self.masked_among = masked_among
        self.method, self.num_facts = method, num_facts
        self.num_sums = 2 if method.needs_total else 1
        self.keeps = method.has_control

    def length(self, size: int) -> int:
        """See `Encoding`."""
        return size + self.num_facts

    def encode(
        self, params: Vector, start: Vector, kept: Mapping[str, Vector], *, num_steps: int, learning_rate: float
    ) -> tuple[np.ndarray, Kept]:
        """See `Encoding`; without the facts."""
        change, control = self.method.change(
            start,
            params,
            kept.get("control", np.float32(0)),
            num_steps=num_steps,
            learning_rate=learning_rate,
        )
        return change, {} if control is None else {"control": control}


@ENCODINGS.register("dense")
class Dense(Encoding):
    """All of the exchanged parameters: as they are, as a change in 16 bits, or as terms of sums."""

    class Config(ExchangeConfig):
        """Keys."""

        dtype: Literal["float32", "float16", "bfloat16"] = "float32"
        """Type of the uploads, with `exchange.mode: gather`. In 16 bits a device sends its change, and adds what
        rounding took away to its next change (error feedback)."""

    @classmethod
    def make(cls, config: Any, method: Method) -> Encoding:
        """See `Encoding`."""
        exchange = config.exchange
        if exchange.sums_only:
            assert isinstance(method, SummedMethod)  # the configuration refuses the others
            return SumTerms(
                exchange,
                method,
                masked_among=config.devices_sampled * (exchange.mode == "secure"),
                num_facts=config.privacy.quantile is not None,
            )
        return Parameters(exchange) if exchange.dtype == "float32" else NarrowChange(exchange)

    @classmethod
    def approximates(cls, config: Any) -> str | None:
        """See `Encoding`."""
        return None if config.dtype == "float32" else f"exchange.dtype: {config.dtype}"
