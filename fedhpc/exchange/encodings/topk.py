"""The largest changes alone, with error feedback: what was not sent is added to the device's next change.

Sparsified SGD with Memory. Stich, Cordonnier, Jaggi. NeurIPS 2018. https://arxiv.org/abs/1809.07599, algorithm 1 with
top-k; the memory is that of the local update, not of a single step.
"""

from collections.abc import Mapping

import numpy as np

from fedhpc.config.sections import ExchangeConfig, Fraction, share_of
from fedhpc.exchange.encoding import Encoding, Kept
from fedhpc.methods.updates import Vector
from fedhpc.registry import ENCODINGS


@ENCODINGS.register("topk")
class TopK(Encoding):
    """k values of P_i - P^t, float32, behind their k places, uint32."""

    class Config(ExchangeConfig):
        """Keys."""

        share: Fraction = 0.01
        """Share of the exchanged parameters whose change is sent; at least one is."""

    dtype = np.dtype(np.uint32)
    """The bits of places and values."""
    keeps = True

    def length(self, size: int) -> int:
        """2 k."""
        return 2 * self._count(size)

    def encode(
        self, params: Vector, start: Vector, kept: Mapping[str, Vector], *, num_steps: int, learning_rate: float
    ) -> tuple[np.ndarray, Kept]:
        """See `Encoding`; of equal changes those at the lowest places are sent."""
        change = params - start + kept.get("residual", np.float32(0))
        places = self._largest(np.abs(change))
        residual = change.copy()
        residual[places] = 0
        return np.concatenate([places.astype(np.uint32), change[places].view(np.uint32)]), {"residual": residual}

    def decode(self, payload: np.ndarray, start: Vector) -> Vector:
        """See `Encoding`."""
        places, values = np.split(payload, 2)
        params: Vector = start.copy()
        params[places] += values.view(np.float32)
        return params

    def _count(self, size: int) -> int:
        return share_of(self.config.share, size)

    def _largest(self, sizes: Vector) -> np.ndarray:
        """Places of the k largest of the sizes [n], ascending; what a sort makes of ties must not decide."""
        count = self._count(sizes.size)
        border = np.partition(sizes, sizes.size - count)[sizes.size - count]
        above, at = np.flatnonzero(sizes > border), np.flatnonzero(sizes == border)
        return np.sort(np.concatenate([above, at[: count - above.size]]))
