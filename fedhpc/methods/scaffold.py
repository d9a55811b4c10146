"""SCAFFOLD: every local step is corrected by how the device's mean step differs from everybody's.

SCAFFOLD: Stochastic Controlled Averaging for Federated Learning. Karimireddy, Kale, Mohri, Reddi, Stich, Suresh. ICML
2020. https://arxiv.org/abs/1910.06378, algorithm 1 with option II.

Where the paper averages over devices, this averages by what their uploads count (`server.weights`), as all methods here
do: 1/|S| becomes w_i, 1/N becomes a device's count over those of all devices; c then is the mean of the c_i by counts.
With `uniform` weights both are the paper's. The paper's devices upload c_i's change beside their model; it follows from
the model and the steps taken, so that the server computes it. With AdamW on the devices c_i is their mean direction,
and corrects AdamW's.
"""

from collections.abc import Mapping

import numpy as np

from fedhpc.config.sections import MethodConfig, PositiveFloat
from fedhpc.methods.base import LocalRule, Method, ServerState, f32
from fedhpc.methods.updates import RoundUploads, Vector
from fedhpc.registry import METHODS


@METHODS.register("scaffold")
class Scaffold(Method):
    """P^{t+1} = P^t + eta_s sum_i w_i (P_i - P^t); c = c + sum_i n_i / n (c_i^+ - c_i)."""

    class Config(MethodConfig):
        """Keys."""

        learning_rate: PositiveFloat = 1.0
        """eta_s."""

    sends = ("control_global",)
    keeps = ("control",)

    def init(self, params: Vector) -> ServerState:
        """c starts at zero, like every c_i."""
        return ServerState(round=0, params=params, vectors={"control_global": np.zeros_like(params)})

    def local_rule(self, sent: Mapping[str, Vector], kept: Mapping[str, Vector]) -> LocalRule:
        """A step along direction - c_i + c."""
        return LocalRule(step_shift=sent["control_global"] - kept.get("control", np.float32(0)))

    def kept_after(
        self,
        start: Vector,
        params: Vector,
        sent: Mapping[str, Vector],
        kept: Mapping[str, Vector],
        *,
        num_steps: int,
        learning_rate: float,
    ) -> dict[str, Vector]:
        """c_i^+ = c_i - c + (P^t - P_i) / (K_i eta)."""
        direction = (start.astype(np.float64) - params) / (num_steps * learning_rate)
        control = kept.get("control", np.float32(0)) - sent["control_global"].astype(np.float64) + direction
        return {"control": f32(control)}

    def step(self, state: ServerState, uploads: RoundUploads) -> ServerState:
        """See the class; sums in the order of device ids."""
        uploads = uploads.in_device_order()
        params, c = state.params.astype(np.float64), state.vectors["control_global"].astype(np.float64)
        change, control_change = np.zeros_like(params), np.zeros_like(c)
        for i, weight in enumerate(uploads.weights):
            own = uploads.params[i] - params
            change += weight * own
            control_change += weight * (-own / (uploads.num_steps[i] * uploads.device_learning_rate) - c)
        share = uploads.counts.sum() / self.total_count
        return ServerState(
            round=state.round + 1,
            params=f32(params + self.config.learning_rate * change),
            vectors={"control_global": f32(c + share * control_change)},
        )
