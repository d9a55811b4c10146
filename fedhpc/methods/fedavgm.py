"""FedAvgM: the devices' mean change as a pseudo-gradient, with momentum at the server.

Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification. Hsu, Qi, Brown. 2019.
https://arxiv.org/abs/1909.06335, section 4.3. With Adam on the devices it is the combination MomS+AdamD.
"""

from dataclasses import replace

import numpy as np

from fedhpc.methods.base import ServerState, f32
from fedhpc.methods.fedavg import FedAvg
from fedhpc.methods.updates import RoundUploads, Sums, Vector


class FedAvgM(FedAvg):
    """v = beta v + (P^t - Pbar); P^{t+1} = P^t - eta_s v."""

    momentum_builds_up = True

    def init(self, params: Vector) -> ServerState:
        """Momentum v starts at zero."""
        return ServerState(round=0, params=params, vectors={"momentum": np.zeros_like(params)})

    def apply(self, state: ServerState, sums: Sums, uploads: RoundUploads) -> ServerState:
        """A step along the momentum."""
        params = state.params.astype(np.float64)
        momentum = self.momentum * state.vectors["momentum"].astype(np.float64) + (params - sums.mean)
        return replace(state, params=f32(params - self.learning_rate * momentum), vectors={"momentum": f32(momentum)})
