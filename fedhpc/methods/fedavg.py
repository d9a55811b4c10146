"""FedAvg: the mean of the uploads, weighted by examples.

Communication-Efficient Learning of Deep Networks from Decentralized Data. McMahan, Moore, Ramage, Hampson,
Agüera y Arcas. AISTATS 2017. https://arxiv.org/abs/1602.05629, Algorithm 1.
"""

from dataclasses import replace

from fedhpc.methods.base import Method, ServerState, f32, weighted_mean
from fedhpc.updates import RoundUploads, Vector


class FedAvg(Method):
    """P^{t+1} = sum_i w_i P_i."""

    def init(self, params: Vector) -> ServerState:
        """No state but the parameters."""
        return ServerState(round=0, params=params)

    def step(self, state: ServerState, uploads: RoundUploads) -> ServerState:
        """One round."""
        return replace(state, round=state.round + 1, params=f32(weighted_mean(uploads.in_device_order())))
