"""FedAvg: the mean of the uploads, weighted by examples.

Communication-Efficient Learning of Deep Networks from Decentralized Data. McMahan, Moore, Ramage, Hampson,
Agüera y Arcas. AISTATS 2017. https://arxiv.org/abs/1602.05629, Algorithm 1.
"""

from dataclasses import replace

import numpy as np

from fedhpc.methods.base import ServerState, SummedMethod, f32
from fedhpc.methods.updates import RoundUploads, Sums, Vector
from fedhpc.registry import METHODS


@METHODS.register("fedavg")
class FedAvg(SummedMethod):
    """P^{t+1} = sum_i w_i P_i."""

    def init(self, params: Vector) -> ServerState:
        """No state but the parameters."""
        return ServerState(round=0, params=params)

    def change(
        self,
        start: Vector,
        params: Vector,
        control: Vector | np.float32,
        *,
        num_steps: int,
        learning_rate: float,
        memory: Vector | None = None,
    ) -> tuple[Vector, Vector | None]:
        """P_i."""
        return params, None

    def origin(self, start: Vector) -> Vector:
        """P^t."""
        return start

    def apply(self, state: ServerState, sums: Sums, uploads: RoundUploads) -> ServerState:
        """The mean is the result."""
        return replace(state, params=f32(sums.mean))
