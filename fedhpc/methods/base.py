"""What every server method shares."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from fedhpc.config import ServerConfig
from fedhpc.updates import RoundUploads, Vector


@dataclass(frozen=True, kw_only=True)
class ServerState:
    """All that the server carries from one round to the next; data, no behaviour.

    Vectors have shape [n], the layout of the exchanged tensors.
    """

    round: int
    """Rounds completed, t."""
    params: Vector
    """P^t."""
    vectors: dict[str, Vector] = field(default_factory=dict)
    """The method's own vectors by name, for example momentum."""
    control: dict[int, Vector] = field(default_factory=dict)
    """c_i of the devices seen so far; a device never seen has c_i = 0 and no entry."""
    scalars: dict[str, float] = field(default_factory=dict)
    """The method's own numbers by name, for example a decaying server learning rate."""

    def restrict(self, kept: NDArray[np.intp]) -> "ServerState":
        """The state of the vector elements ``kept`` alone, when layers leave the exchange."""
        return replace(
            self,
            params=self.params[kept],
            vectors={name: vector[kept] for name, vector in self.vectors.items()},
            control={device: vector[kept] for device, vector in self.control.items()},
        )


class Method(ABC):
    """One way to turn a round's uploads into the next global parameters.

    Sums run in a fixed order in float64 and are stored as float32, so that the result does not depend on how many
    ranks took part.
    """

    def __init__(self, config: ServerConfig, *, num_devices: int, sample_rate: float) -> None:
        self.config = config
        self.num_devices = num_devices
        self.sample_rate = sample_rate

    @abstractmethod
    def init(self, params: Vector) -> ServerState:
        """The state before round 0."""

    @abstractmethod
    def update(self, state: ServerState, uploads: RoundUploads) -> ServerState:
        """The state after one round. Pure: the given state stays as it is."""


def weighted_mean(uploads: RoundUploads) -> NDArray[np.float64]:
    """Pbar = sum_i w_i P_i in float64, in the order of the uploads; shape [n]."""
    mean = np.zeros(uploads.params.shape[1])
    for weight, params in zip(uploads.weights, uploads.params, strict=True):
        mean += weight * params
    return mean


def f32(vector: NDArray[np.float64]) -> Vector:
    """Round to the stored precision."""
    return vector.astype(np.float32)
