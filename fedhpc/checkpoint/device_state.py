"""What a device keeps between its rounds and, after a stop, within one; checkpoints hold it."""

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from fedhpc.methods.updates import Vector

Moments = dict[str, NDArray[np.float32]]
"""Adam's moments and step count by name, `<tensor>.<exp_avg|exp_avg_sq|step>`."""
PERSONAL = "personal"
"""Of what a device keeps, the parameters of its own that it trains beside P_i."""
NEXT_PERSONAL = "next_personal"
"""Those after the round under way, until the device's update is done, too."""
FISHER = ".fisher"
"""What a tensor's name ends with where its Fisher information is stored beside the optimizer's moments."""


@dataclass(frozen=True, kw_only=True)
class DeviceState:
    """What a device keeps between its rounds; it never leaves the devices' ranks but for a checkpoint."""

    local: Vector
    """p_i, tensors of the layers that are not exchanged."""
    steps_taken: int = 0
    moments: Moments | None = None
    """Only with `device.reset_moments: false`."""
    fisher: Vector | None = None
    """Diagonal Fisher information of p_i from its first round, where `sparse.fraction` asks for it."""
    traces: NDArray[np.float64] | None = None
    """The Fisher information of each of its batches before round 0, where a curriculum orders them."""
    kept: dict[str, Vector] = field(default_factory=dict)
    """Vectors in the layout of the exchanged tensors: what is left of its uploads, see
    `fedhpc.exchange.encoding.Encoding`, and what the server's method asks it to keep, see
    `fedhpc.methods.Method.keeps`."""

    @property
    def own(self) -> Vector:
        """What makes a device's tensors its own: its parameters beside P_i, if it has some, and p_i."""
        return np.concatenate([self.kept[PERSONAL], self.local]) if PERSONAL in self.kept else self.local

    def narrowed(self, kept_elements: NDArray[np.intp], unseen_local: Vector) -> "DeviceState":
        """The state after layers have left the exchange; their tensors start anew."""
        kept = {name: vector[kept_elements] for name, vector in self.kept.items()}
        return replace(self, local=unseen_local, fisher=None, kept=kept)


@dataclass(frozen=True, kw_only=True)
class UnfinishedUpdate:
    """A local update that was stopped between two steps, with all that it takes to go on to the same bits."""

    tensors: dict[str, NDArray[np.float32]]
    """All trainable tensors, whole."""
    moments: Moments
    losses: NDArray[np.float32]
    """One for each step taken; shape [k]."""
