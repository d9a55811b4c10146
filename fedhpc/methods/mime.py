"""MIME: the devices' steps use the server's momentum, which stays fixed during a round (MomD).

Mime: Mimicking Centralized Stochastic Algorithms in Federated Learning. Karimireddy, Jaggi, Kale, Mohri, Reddi, Stich,
Suresh. 2020. https://arxiv.org/abs/2008.03606, algorithm 1 for SGD with momentum, in the variant MimeLite: without the
correction of each gradient.
"""

from collections.abc import Mapping

import numpy as np

from fedhpc.methods.base import LocalRule, Method, ServerState, f32, weighted_mean
from fedhpc.methods.updates import RoundUploads, Vector


class Mime(Method):
    """Local steps along (1 - beta) g + beta m; P^{t+1} = sum_i w_i P_i; m = (1 - beta) sum_i w_i g_i(P^t) + beta m."""

    sends = ("momentum",)
    uploads_gradient = True
    momentum_builds_up = True

    def init(self, params: Vector) -> ServerState:
        """Momentum m starts at zero."""
        return ServerState(round=0, params=params, vectors={"momentum": np.zeros_like(params)})

    def local_rule(self, sent: Mapping[str, Vector], kept: Mapping[str, Vector]) -> LocalRule:
        """(1 - beta) g + beta m."""
        return LocalRule(gradient_scale=1 - self.momentum, gradient_shift=np.float32(self.momentum) * sent["momentum"])

    def step(self, state: ServerState, uploads: RoundUploads) -> ServerState:
        """See the class; sums in the order of device ids."""
        uploads = uploads.in_device_order()
        gradient = np.zeros(state.params.size)
        for weight, own in zip(uploads.weights, uploads.gradients, strict=True):
            gradient += weight * own
        momentum = (1 - self.momentum) * gradient + self.momentum * state.vectors["momentum"].astype(np.float64)
        return ServerState(
            round=state.round + 1, params=f32(weighted_mean(uploads)), vectors={"momentum": f32(momentum)}
        )
