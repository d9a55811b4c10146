"""FedAvgM: the devices' mean change as a pseudo-gradient, with momentum at the server.

Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification. Hsu, Qi, Brown. 2019.
https://arxiv.org/abs/1909.06335, section 4.3. With Adam on the devices it is the combination MomS+AdamD.
"""

from dataclasses import replace
from typing import Any

import numpy as np

from fedhpc.errors import ConfigError
from fedhpc.methods.base import MomentumConfig, ServerState, built_up, f32
from fedhpc.methods.fedavg import FedAvg
from fedhpc.methods.updates import RoundUploads, Sums, Vector
from fedhpc.registry import METHODS


@METHODS.register("fedavgm")
class FedAvgM(FedAvg):
    """v = beta v + (P^t - Pbar); P^{t+1} = P^t - eta_s v."""

    Config = MomentumConfig

    @property
    def usual_growth(self) -> float:
        """See `Method`."""
        return built_up(self.config.momentum)

    def init(self, params: Vector) -> ServerState:
        """Momentum v starts at zero."""
        return ServerState(round=0, params=params, vectors={"momentum": np.zeros_like(params)})

    def apply(self, state: ServerState, sums: Sums, uploads: RoundUploads) -> ServerState:
        """A step along the momentum."""
        params = state.params.astype(np.float64)
        momentum = self.config.momentum * state.vectors["momentum"].astype(np.float64) + (params - sums.mean)
        return replace(
            state, params=f32(params - self.config.learning_rate * momentum), vectors={"momentum": f32(momentum)}
        )


@METHODS.register("moms_adamd")
class MomSAdamD(FedAvgM):
    """FedAvgM with Adam on the devices: server momentum, device Adam."""

    @classmethod
    def check(cls, config: Any) -> None:
        """See `Method`."""
        super().check(config)
        if config.device.optimizer != "adamw":
            raise ConfigError("server.method: moms_adamd is Adam on the devices; it needs device.optimizer: adamw")
