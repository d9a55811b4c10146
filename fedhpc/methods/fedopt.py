"""FedAdam and FedYogi: adaptive optimization at the server.

Adaptive Federated Optimization. Reddi, Charles, Zaheer, Garrett, Rush, Konečný, Kumar, McMahan. ICLR 2021.
https://arxiv.org/abs/2003.00295, algorithm 2; Delta_t is the mean weighted by examples, there is no bias correction.
"""

from abc import abstractmethod
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fedhpc.config.sections import PositiveFloat, Probability
from fedhpc.methods.base import MomentumConfig, ServerState, built_up, f32
from fedhpc.methods.fedavg import FedAvg
from fedhpc.methods.updates import RoundUploads, Sums, Vector
from fedhpc.registry import METHODS

Array = NDArray[np.float64]


class FedOpt(FedAvg):
    """m = beta1 m + (1 - beta1) Delta; v by the subclass; P^{t+1} = P^t + eta_s m / (sqrt(v) + tau)."""

    class Config(MomentumConfig):
        """Keys."""

        learning_rate: PositiveFloat = 0.01
        """eta_s."""
        second_momentum: Probability = 0.99
        """beta_2, of the second moment."""
        tau: PositiveFloat = 1e-3
        """Added to the root of the second moment."""

    @property
    def usual_growth(self) -> float:
        """See `Method`."""
        return built_up(self.config.momentum)

    @abstractmethod
    def second_moment(self, v: Array, squared: Array) -> Array:
        """The next v, from Delta^2."""

    def init(self, params: Vector) -> ServerState:
        """m starts at zero, v at tau^2."""
        second = np.full_like(params, self.config.tau**2)
        return ServerState(round=0, params=params, vectors={"momentum": np.zeros_like(params), "second_moment": second})

    def apply(self, state: ServerState, sums: Sums, uploads: RoundUploads) -> ServerState:
        """One step of the adaptive optimizer."""
        params = state.params.astype(np.float64)
        m, v = (state.vectors[name].astype(np.float64) for name in ("momentum", "second_moment"))
        delta = sums.mean - params
        beta = self.config.momentum
        m = beta * m + (1 - beta) * delta
        v = self.second_moment(v, delta**2)
        step = self.config.learning_rate * m / (np.sqrt(v) + self.config.tau)
        return replace(state, params=f32(params + step), vectors={"momentum": f32(m), "second_moment": f32(v)})


@METHODS.register("fedadam")
class FedAdam(FedOpt):
    """v = beta2 v + (1 - beta2) Delta^2."""

    def second_moment(self, v: Array, squared: Array) -> Array:
        """An exponential mean."""
        beta = self.config.second_momentum
        return beta * v + (1 - beta) * squared


@METHODS.register("fedyogi")
class FedYogi(FedOpt):
    """v = v - (1 - beta2) Delta^2 sign(v - Delta^2)."""

    def second_moment(self, v: Array, squared: Array) -> Array:
        """A change that does not depend on how large v is."""
        return v - (1 - self.config.second_momentum) * squared * np.sign(v - squared)
