"""Named tensors in one contiguous float32 vector: the wire format, and the unit in which the server computes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float32]
"""Shape [n]: all exchanged tensors, one behind the other."""


@dataclass(frozen=True)
class Layout:
    """Which tensors a vector holds, in what order."""

    shapes: Mapping[str, tuple[int, ...]]
    _ends: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        ends, end = {}, 0
        for name, shape in self.shapes.items():
            end += prod(shape)
            ends[name] = end
        object.__setattr__(self, "_ends", ends)

    @property
    def size(self) -> int:
        """Floats in a vector of this layout."""
        return next(reversed(self._ends.values()), 0)

    @property
    def nbytes(self) -> int:
        """Bytes of a vector of this layout."""
        return 4 * self.size

    def views(self, vector: np.ndarray) -> dict[str, np.ndarray]:
        """The named tensors inside ``vector`` [..., n], sharing its memory: shape [..., *shape]."""
        return {
            name: vector[..., self._ends[name] - prod(shape) : self._ends[name]].reshape(*vector.shape[:-1], *shape)
            for name, shape in self.shapes.items()
        }

    def pack(self, tensors: Mapping[str, np.ndarray], dtype: type = np.float32) -> np.ndarray:
        """A new vector [n] with copies of the named tensors."""
        vector: np.ndarray = np.empty(self.size, dtype)
        for name, view in self.views(vector).items():
            view[...] = tensors[name]
        return vector


@dataclass(frozen=True, kw_only=True)
class RoundUploads:
    """What the sampled devices of one round sent, in sampled order; m devices, n floats each."""

    device_ids: NDArray[np.int64]
    """Shape [m]."""
    num_examples: NDArray[np.int64]
    """n_i, shape [m]."""
    num_steps: NDArray[np.int64]
    """K_i, optimizer steps taken, shape [m]."""
    params: Vector
    """P_i, shape [m, n]."""
    device_learning_rate: float
    """eta of this round."""

    @property
    def weights(self) -> NDArray[np.float64]:
        """w_i = n_i / sum of n_j over the round's devices, shape [m]."""
        return self.num_examples / self.num_examples.sum()

    def in_device_order(self) -> "RoundUploads":
        """The same uploads by ascending device id, so that sums do not depend on the sampling order."""
        order = np.argsort(self.device_ids, kind="stable")
        return RoundUploads(
            device_ids=self.device_ids[order],
            num_examples=self.num_examples[order],
            num_steps=self.num_steps[order],
            params=self.params[order],
            device_learning_rate=self.device_learning_rate,
        )
