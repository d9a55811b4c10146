"""FedBuff: the server waits for no device, and steps whenever its buffer has the changes of K of them.

Federated Learning with Buffered Asynchronous Aggregation. Nguyen, Malik, Zhan, Yousefpour, Rabbat, Malek, Huba.
AISTATS 2022. https://arxiv.org/abs/2106.06639, algorithm 1; momentum as in its released code
(github.com/facebookresearch/FLSim, `FedAvgWithLRFedBuffAggregator`). Which changes arrive when is a matter of the
simulated clock; see `fedhpc.exchange.timeline`.
"""

from dataclasses import replace
from typing import Any

import numpy as np

from fedhpc.config.sections import MethodConfig, NonNegativeFloat, Positive, PositiveFloat, Probability
from fedhpc.errors import ConfigError
from fedhpc.methods.adding import add_up
from fedhpc.methods.base import Method, ServerState, built_up, f32
from fedhpc.methods.in_flight import NAME, NOW, Arrivals, Flight, in_flight
from fedhpc.methods.updates import RoundUploads, Vector
from fedhpc.registry import METHODS


@METHODS.register("fedbuff")
class FedBuff(Method):
    """v = beta v + sum_i w_i (1 + tau_i)^-alpha Delta_i; P^{t+1} = P^t + eta_s v; Delta_i = P_i - P^{t - tau_i}."""

    class Config(MethodConfig):
        """Keys."""

        learning_rate: PositiveFloat = 1.0
        """eta_s."""
        momentum: Probability = 0.0
        """beta, of the first moment."""
        staleness: NonNegativeFloat = 0.5
        """alpha: a change counts (1 + tau)^-alpha as much if the server has taken tau steps since its device was sent
        the parameters."""
        concurrency: Positive | None = None
        """Devices at work at any time, M_c; null: twice as many as a step takes (`federation.sample_rate`), if there
        are so many."""

    @classmethod
    def check(cls, config: Any) -> None:
        """See `Method`."""
        super().check(config)
        simulation, wanted = config.simulation, config.federation.devices_per_round
        if simulation.step_seconds == "measured":
            raise ConfigError(
                "server.method: fedbuff needs simulation.step_seconds as a number: the order in which changes arrive "
                "must not depend on how fast a machine is today"
            )
        for key in ("deadline_s", "over_selection"):
            if getattr(simulation, key):
                raise ConfigError(
                    f"server.method: fedbuff waits for no device; simulation.{key}: {getattr(simulation, key):g} is "
                    "for methods that do"
                )
        if config.trace:
            raise ConfigError(
                "server.method: fedbuff steps by changes of several rounds, of which a trace has but one round's; it "
                "needs trace: false"
            )
        if not wanted <= cls.concurrency(config) <= config.federation.num_training:
            raise ConfigError(
                f"server.concurrency: {config.server.concurrency} devices at work at a time; valid: from {wanted}, "
                f"which a step takes (federation.sample_rate), to {config.federation.num_training}, which can train"
            )

    @classmethod
    def concurrency(cls, config: Any) -> int:
        """See `Method`."""
        federation = config.federation
        return config.server.concurrency or min(2 * federation.devices_per_round, federation.num_training)

    @property
    def usual_growth(self) -> float:
        """See `Method`."""
        return built_up(self.config.momentum)

    def init(self, params: Vector) -> ServerState:
        """Nothing is under way."""
        return ServerState(round=0, params=params, vectors={"momentum": np.zeros_like(params)}, scalars={NOW: 0.0})

    def step(self, state: ServerState, uploads: RoundUploads) -> ServerState:
        """One step by the changes that have arrived; the uploads' others stay in the state until then."""
        params = state.params.astype(np.float64)
        flights, arrivals = in_flight(state.scalars), uploads.arrivals or _all_at_once(state, uploads)
        changes = {device: state.vectors[f"{NAME}{device}"] for device in flights}
        for row, device in enumerate(uploads.device_ids.tolist()):
            changes[device] = f32(uploads.params[row] - params)
            count, arrives = int(uploads.counts[row]), arrivals.arrives[device]
            flights[device] = Flight(sent=state.round, arrives=arrives, count=count)
        taken = sorted(arrivals.taken.keys() & changes.keys())  # all but those whose uploads were rejected
        counts = np.array([flights[device].count for device in taken], np.float64)
        stale = np.array([arrivals.taken[device] for device in taken], np.float64)
        weights = counts / counts.sum() * (1 + stale) ** -self.config.staleness
        mean = add_up([changes[device] for device in taken], weights, params.size).mean
        momentum = self.config.momentum * state.vectors["momentum"].astype(np.float64) + mean
        later = sorted(changes.keys() - arrivals.taken.keys())
        return replace(
            state,
            round=state.round + 1,
            params=f32(params + self.config.learning_rate * momentum),
            vectors={"momentum": f32(momentum)} | {f"{NAME}{device}": changes[device] for device in later},
            scalars={NOW: arrivals.now} | {k: v for each in later for k, v in flights[each].numbers(each).items()},
        )


def _all_at_once(state: ServerState, uploads: RoundUploads) -> Arrivals:
    """Where no clock says anything else, the uploads arrive with the step."""
    now, devices = state.scalars[NOW], uploads.device_ids.tolist()
    return Arrivals(began=now, now=now, taken=dict.fromkeys(devices, 0), arrives=dict.fromkeys(devices, now))
