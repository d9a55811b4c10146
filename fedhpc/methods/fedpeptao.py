"""FedPepTAO's server side: momentum, and control variates against client drift.

Federated Learning of Large Language Models with Parameter-Efficient Prompt Tuning and Adaptive Optimization. Che, Liu,
Zhou, Ren, Zhou, Sheng, Dai, Dou. EMNLP 2023. https://arxiv.org/abs/2310.15080. Released code:
github.com/llm-eff/FedPepTAO.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import model_validator

from fedhpc.config.sections import MethodConfig, PositiveFloat, Probability
from fedhpc.errors import ConfigError
from fedhpc.methods.base import Method, Population, ServerState, SummedMethod, f32, weighted_mean
from fedhpc.methods.updates import RoundUploads, Sums, Vector
from fedhpc.registry import METHODS

SERVER_LEARNING_RATE_DECAY = 0.99
SERVER_LEARNING_RATE_FLOOR = 1e-4
PAPER = ("paper", "released")
"""Variants whose control variates carry 1 / (K eta)."""
PAPER_LEARNING_RATE = 1e-2
"""Device learning rate below which they are warned about."""
RELEASED_STEPS = "server.variant released, its steps"
"""In the identity of runs since that variant has been what the published code computes; before, it was `paper`."""
OLD_RELEASED = (
    "was written when server.variant: released computed what server.variant: paper computes now; choose another run_dir"
)
"""Said of a checkpoint."""


class DriftCorrected(SummedMethod):
    """The paper's ingredients with consistent units: everything is a mean step direction, (P^t - P_i) / (K_i eta).

    1. d_i = (P^t - P_i) / (K_i eta)
    2. d~_i = d_i - c_i + c: the device's known bias out, the population's mean in
    3. m = beta m + (1 - beta) sum_i w_i d~_i, for use divided by 1 - beta^(t+1)
    4. P^{t+1} = P^t - eta_s (sum_i w_i K_i) eta m: with eta_s = 1, beta = 0 and all c = 0 the mean of the P_i
    5. c = c + (1/N) sum_i (d_i - c_i), then c_i = d_i

    With `server.control_variates: false` all c are zero.
    """

    def __init__(self, config: Any, population: Population) -> None:
        super().__init__(config, population)
        self.needs_total = self.has_control = config.control_variates

    def init(self, params: Vector) -> ServerState:
        """Momentum m and the global control variate c start at zero."""
        names = ("momentum", "control_global") if self.has_control else ("momentum",)
        return ServerState(round=0, params=params, vectors={name: np.zeros_like(params) for name in names})

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
        """d_i - c_i, and d_i as the new c_i."""
        direction: Vector = np.subtract(start, params, out=memory)
        direction *= np.float32(1 / (num_steps * learning_rate))  # 1
        return direction - control, direction if self.has_control else None

    def apply(self, state: ServerState, sums: Sums, uploads: RoundUploads) -> ServerState:
        """Momentum, the step along it, and the global control variate."""
        beta, eta = self.config.momentum, uploads.device_learning_rate
        c = state.vectors["control_global"].astype(np.float64) if self.has_control else np.float64(0)
        # 2: sum_i w_i d~_i = sum_i w_i (d_i - c_i) + c
        momentum = beta * state.vectors["momentum"].astype(np.float64) + (1 - beta) * (sums.mean + c)  # 3
        unbiased = momentum / (1 - beta ** (state.round + 1))  # 3
        mean_steps = float(uploads.weights @ uploads.num_steps)
        step = self.config.learning_rate * mean_steps * eta
        vectors = {"momentum": f32(momentum)}
        if sums.total is not None:
            vectors["control_global"] = f32(c + sums.total / self.num_devices)  # 5
        return replace(state, params=f32(state.params.astype(np.float64) - step * unbiased), vectors=vectors)  # 4


class Paper(Method):
    """The server step as the paper describes it: sampled order, mixed units, a decaying server learning rate.

    1. c_i' = c_i - c + (P^t - P_i) / (K_i eta)
    2. c = c + sample_rate sum_i (K_i / sum_j K_j) (c_i' - c_i), then c_i = c_i'
    3. Round 0: P^{t+1} = Pbar = sum_i w_i P_i. Later eta_s = max(0.99 eta_s, 1e-4) and g = delta^{t-1} - delta^t, where
       delta^t = P^t - Pbar; from device to device v = beta v + (1 - beta) g + c - c_i, and P^{t+1} = Pbar - eta_s sum_i
       w_i v. That sum is the v which the next round begins with.

    Control variates carry 1 / (K_i eta): at a device learning rate of 5e-3 the run diverges, at the published 4e-2 it
    learns.
    """

    has_control = True
    steps_pile_up = False
    """Whether a device's step begins where that of the device before ended, instead of at Pbar."""

    def init(self, params: Vector) -> ServerState:
        """All start at zero; the server learning rate decays from round 1 on."""
        return ServerState(
            round=0,
            params=params,
            vectors={name: np.zeros_like(params) for name in ("momentum", "previous_delta", "control_global")},
            scalars={"server_learning_rate": self.config.learning_rate},
        )

    @property
    def if_it_diverges(self) -> str:  # type: ignore[override]
        """See `Method`."""
        return f"; variant {self.config.variant} wants device.learning_rate near 0.04"

    def server_learning_rate(self, state: ServerState) -> float | None:
        """See `Method`."""
        return state.scalars["server_learning_rate"]

    def step(self, state: ServerState, uploads: RoundUploads) -> ServerState:
        """One round; the numbers are those of the class's steps."""
        params = state.params.astype(np.float64)
        mean = weighted_mean(uploads)
        delta = params - mean
        c, control = self._update_control(state, uploads)
        momentum = state.vectors["momentum"]
        server_learning_rate = state.scalars["server_learning_rate"]
        new_params = mean
        if state.round > 0:  # 3
            server_learning_rate = max(SERVER_LEARNING_RATE_DECAY * server_learning_rate, SERVER_LEARNING_RATE_FLOOR)
            gradient = state.vectors["previous_delta"] - delta
            v, beta = momentum.astype(np.float64), self.config.momentum
            mean_v, moved, mean_moved = (np.zeros_like(params) for _ in range(3))
            for weight, device in zip(uploads.weights, uploads.device_ids, strict=True):
                v = beta * v + (1 - beta) * gradient + c - control[int(device)]
                mean_v += weight * v
                moved = moved + v if self.steps_pile_up else v
                mean_moved += weight * moved
            new_params = mean - server_learning_rate * mean_moved
            momentum = f32(mean_v)
        return replace(
            state,
            round=state.round + 1,
            params=f32(new_params),
            vectors={"momentum": momentum, "previous_delta": f32(delta), "control_global": f32(c)},
            control=control,
            scalars={"server_learning_rate": server_learning_rate},
        )

    def _update_control(
        self, state: ServerState, uploads: RoundUploads
    ) -> tuple[NDArray[np.float64], dict[int, Vector]]:
        """Steps 1 and 2: the new global and per-device control variates."""
        c = state.vectors["control_global"].astype(np.float64)
        change = np.zeros_like(c)
        control = {}
        total_steps = uploads.num_steps.sum()
        for i, device in enumerate(uploads.device_ids.tolist()):
            steps = uploads.num_steps[i]
            c_i = state.control.get(device, np.float32(0))
            drift = (state.params.astype(np.float64) - uploads.params[i]) / (steps * uploads.device_learning_rate)
            c_i_new = c_i - c + drift  # 1
            change += steps / total_steps * (c_i_new - c_i)
            control[device] = f32(c_i_new)
        return c + self.sample_rate * change, control  # 2


class Released(Paper):
    """The arithmetic that the published code performs: as `Paper`, but steps pile up from device to device.

    What the code means to restore before each device shares its memory with the live parameters (`original_w =
    model.get_generator_param()` is a state_dict; run_fed_pers_with_optim_v2.py), so that P^{t+1} = Pbar - eta_s sum_i
    w_i sum_{j<=i} v_j, j and i in sampled order. With ten devices the step is four to six times as long.
    """

    steps_pile_up = True


@METHODS.register("fedpeptao")
class FedPepTAO(Method):
    """The variants, by `server.variant`."""

    VARIANTS: ClassVar[dict[str, type[Method]]] = {
        "drift_corrected": DriftCorrected,
        "paper": Paper,
        "released": Released,
    }

    class Config(MethodConfig):
        """Keys."""

        variant: Literal["drift_corrected", "paper", "released"] = "drift_corrected"
        """`paper` is the server step as the paper describes it: its control variates carry 1/(K eta), so it diverges at
        device.learning_rate 5e-3 and learns at the published 4e-2. `released` is the arithmetic that the published code
        performs, whose steps are several times as long."""
        learning_rate: PositiveFloat = 1.5
        """eta_s; 0.05 by default in the other variants."""
        momentum: Probability = 0.5
        """beta, of the first moment; 0.9 by default in the other variants."""
        control_variates: bool = True
        """False leaves the control variates of `drift_corrected` out."""

        @model_validator(mode="before")
        @classmethod
        def _defaults_of_variant(cls, values: Any) -> Any:
            if not isinstance(values, dict) or values.get("variant") not in PAPER:
                return values
            given = {key: value for key, value in values.items() if value is not None}
            return {"learning_rate": 0.05, "momentum": 0.9, **given}

    @classmethod
    def make(cls, config: Any, population: Population) -> Method:
        """See `Method`."""
        return cls.VARIANTS[config.variant](config, population)

    @classmethod
    def works_with_sums(cls, config: Any) -> bool:
        """See `Method`."""
        return issubclass(cls.VARIANTS[config.variant], SummedMethod)

    @classmethod
    def label(cls, config: Any) -> str:
        """The variant."""
        return str(config.variant)

    @classmethod
    def check(cls, config: Any) -> None:
        """See `Method`."""
        if config.server.variant in PAPER and not config.server.control_variates:
            raise ConfigError("server.control_variates: false needs server.variant: drift_corrected")
        super().check(config)

    @classmethod
    def notices(cls, config: Any) -> Iterator[str]:
        """See `fedhpc.config.sections.Part`."""
        if config.server.variant in PAPER and config.device.learning_rate < PAPER_LEARNING_RATE:
            yield (
                f"server.variant: {config.server.variant} is known to diverge at small device.learning_rate (found "
                f"{config.device.learning_rate}); the published one is 0.04"
            )

    @classmethod
    def identity(cls, config: Any) -> dict[str, Any]:
        """Tells runs of `released` from those of when it computed what `paper` computes."""
        return {RELEASED_STEPS: "pile up"} if config.server.variant == "released" else {}


def may_be_old_released(config: Mapping[str, Any]) -> bool:
    """Whether a run's configuration, dotted, leaves open which of both it computed."""
    return config.get("server.variant") == "released"


def as_called_now(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of a run's configuration that would be called otherwise today, from its identity."""
    return {"server.variant": "paper"} if is_old_released(saved) else {}


def is_old_released(saved: Mapping[str, Any]) -> bool:
    """Whether a run, by its identity, was made when `server.variant: released` computed what `paper` computes now."""
    return saved.get("server.variant") == "released" and RELEASED_STEPS not in saved
