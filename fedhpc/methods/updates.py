"""Named tensors in one contiguous float32 vector: the wire format, and the unit in which the server computes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from math import prod

import numpy as np
from numpy.typing import NDArray

from fedhpc.methods.in_flight import Arrivals

Vector = NDArray[np.float32]
"""Shape [n]: all exchanged tensors, one behind the other."""

BLOCK = 1 << 16
"""Elements that a processor's cache holds with room for what is computed from them."""
ADAM_STEP = 10.0
"""Most that one Adam step can move a parameter, in units of the learning rate: (1 - beta1) / sqrt(1 - beta2) = 3.2 with
PyTorch's defaults (Kingma and Ba, ICLR 2015, section 2.1), and three times that for rounding and weight decay."""


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

    def pack(
        self, tensors: Mapping[str, np.ndarray], dtype: type = np.float32, *, out: np.ndarray | None = None
    ) -> np.ndarray:
        """A vector [n] with copies of the named tensors: ``out``, or a new one."""
        vector: np.ndarray = np.empty(self.size, dtype) if out is None else out
        for name, view in self.views(vector).items():
            view[...] = tensors[name]
        return vector


@dataclass(frozen=True, kw_only=True)
class Sums:
    """Of one vector [n] a device, over the devices of a round."""

    mean: NDArray[np.float64]
    """Weighted by w_i."""
    total: NDArray[np.float64] | None
    """Unweighted; None where the method does not ask for it."""

    def block(self, elements: slice) -> "Sums":
        """The sums of these elements."""
        return Sums(mean=self.mean[elements], total=None if self.total is None else self.total[elements])


@dataclass(frozen=True, kw_only=True)
class RoundUploads:
    """What the sampled devices of one round sent, in sampled order; m devices, n floats each."""

    device_ids: NDArray[np.int64]
    """Shape [m]."""
    num_examples: NDArray[np.int64]
    """n_i, shape [m]."""
    num_steps: NDArray[np.int64]
    """K_i, optimizer steps taken, shape [m]."""
    params: Sequence[Vector]
    """P_i, m vectors [n]; none where only their sums arrived."""
    device_learning_rate: float
    """eta of this round."""
    gradients: Sequence[Vector] = ()
    """Gradients of the devices' whole shards at P^t, m vectors [n], where the method asks for them."""
    sums: Sums | None = None
    control_memory: Sequence[Vector] = ()
    """Where the devices' new c_i may be written, m vectors [n] by ascending device id; none: new memory."""
    counts: NDArray[np.int64] | NDArray[np.float64]
    """What each upload counts, by `server.weights`: n_i, the trained tokens in the n_i examples, or 1; shape [m]."""

    arrivals: Arrivals | None = None
    """Which changes arrive when, at a server that waits for no device; None: all of these, together."""

    @property
    def weights(self) -> NDArray[np.float64]:
        """w_i, what an upload counts of what the round's uploads count together, shape [m]."""
        return self.counts / self.counts.sum()

    def block(self, elements: slice) -> "RoundUploads":
        """The same uploads, but only these elements of the vectors."""
        return replace(
            self,
            params=[params[elements] for params in self.params],
            gradients=[gradient[elements] for gradient in self.gradients],
            sums=self.sums and self.sums.block(elements),
            control_memory=[vector[elements] for vector in self.control_memory],
        )

    def in_device_order(self) -> "RoundUploads":
        """The same uploads by ascending device id, so that sums do not depend on the sampling order."""
        order = np.argsort(self.device_ids, kind="stable").tolist()
        return replace(
            self,
            device_ids=self.device_ids[order],
            num_examples=self.num_examples[order],
            counts=self.counts[order],
            num_steps=self.num_steps[order],
            params=[self.params[place] for place in order],
            gradients=[self.gradients[place] for place in order] if self.gradients else (),
        )


class Fault(IntEnum):
    """What makes an upload unfit for use."""

    NONE = 0
    NAN = 1
    INFINITE = 2
    TOO_LARGE = 3


def fault_of(params: Vector, start: Vector, *, num_steps: int, learning_rate: float) -> Fault:
    """Whether a vector [n] can be the outcome of a local update from ``start``."""
    # By the triangle inequality, which asks for one look at one vector, or else exactly. Both are false for NaN.
    if length(params) <= longest_way(start.size, num_steps=num_steps, learning_rate=learning_rate):
        return Fault.NONE
    if distance(params, start) <= longest_change(start, num_steps=num_steps, learning_rate=learning_rate):
        return Fault.NONE
    if np.isnan(params).any():
        return Fault.NAN
    return Fault.TOO_LARGE if np.isfinite(params).all() else Fault.INFINITE


def longest_change(start: Vector, *, num_steps: int, learning_rate: float) -> float:
    """No local update goes further from ``start`` [n]."""
    # Weight decay pulls towards zero, over any number of steps at most by the whole length of the vector.
    return longest_way(start.size, num_steps=num_steps, learning_rate=learning_rate) + length(start)


def longest_way(size: int, *, num_steps: int, learning_rate: float) -> float:
    """No optimizer takes a vector of so many elements further, but for weight decay."""
    return num_steps * learning_rate * ADAM_STEP * math.sqrt(size)


def length(vector: Vector) -> float:
    """Euclidean norm; infinite where squares overflow float32."""
    total = 0.0
    with np.errstate(invalid="ignore", over="ignore"):
        for first in range(0, vector.size, BLOCK):
            part = vector[first : first + BLOCK]
            total += float(np.dot(part, part))
    return math.sqrt(total)


def distance(vector: Vector, other: Vector) -> float:
    """Euclidean, in float64; no library for linear algebra, whose sums depend on its threads."""
    total = 0.0
    with np.errstate(invalid="ignore"):
        for first in range(0, vector.size, BLOCK):
            block = slice(first, first + BLOCK)
            total += float(np.square(vector[block].astype(np.float64) - other[block].astype(np.float64)).sum())
    return math.sqrt(total)
