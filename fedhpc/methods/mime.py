"""MIME: the devices' steps use the server's momentum, which stays fixed during a round (MomD).

Mime: Mimicking Centralized Stochastic Algorithms in Federated Learning. Karimireddy, Jaggi, Kale, Mohri, Reddi, Stich,
Suresh. 2020. https://arxiv.org/abs/2008.03606, algorithm 1 for SGD with momentum, in the variant MimeLite: without the
correction of each gradient.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from fedhpc.config.sections import MethodConfig, Probability
from fedhpc.errors import ConfigError
from fedhpc.methods.adding import add_up
from fedhpc.methods.base import LocalRule, Method, ServerState, built_up, f32, weighted_mean
from fedhpc.methods.updates import RoundUploads, Vector
from fedhpc.registry import METHODS


@METHODS.register("mime")
class Mime(Method):
    """Local steps along (1 - beta) g + beta m; P^{t+1} = sum_i w_i P_i; m = (1 - beta) sum_i w_i g_i(P^t) + beta m."""

    class Config(MethodConfig):
        """Keys."""

        momentum: Probability = 0.9
        """beta, of the first moment."""

    sends = ("momentum",)
    uploads_gradient = True

    @classmethod
    def check(cls, config: Any) -> None:
        """See `Method`."""
        if config.device.optimizer != "sgd":
            raise ConfigError("server.method: mime lends devices its momentum for SGD; it needs device.optimizer: sgd")
        if (found := config.parts["exchange"].approximates(config.exchange)) is not None:
            raise ConfigError(f"{found} sends changes; server.method: mime needs float32")
        super().check(config)

    @property
    def usual_growth(self) -> float:
        """See `Method`."""
        return built_up(self.config.momentum)

    def init(self, params: Vector) -> ServerState:
        """Momentum m starts at zero."""
        return ServerState(round=0, params=params, vectors={"momentum": np.zeros_like(params)})

    def local_rule(self, sent: Mapping[str, Vector], kept: Mapping[str, Vector]) -> LocalRule:
        """(1 - beta) g + beta m."""
        beta = self.config.momentum
        return LocalRule(gradient_scale=1 - beta, gradient_shift=np.float32(beta) * sent["momentum"])

    def step(self, state: ServerState, uploads: RoundUploads) -> ServerState:
        """See the class; sums in the order of device ids."""
        uploads = uploads.in_device_order()
        gradient = add_up(uploads.gradients, uploads.weights, state.params.size).mean
        beta = self.config.momentum
        momentum = (1 - beta) * gradient + beta * state.vectors["momentum"].astype(np.float64)
        return ServerState(
            round=state.round + 1, params=f32(weighted_mean(uploads)), vectors={"momentum": f32(momentum)}
        )
