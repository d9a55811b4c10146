"""The server's side: noise on the sum, what it costs, and what may be told of a round."""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedhpc.config import Config
from fedhpc.config.sections import PrivacyConfig
from fedhpc.errors import ConfigError
from fedhpc.federation.sampling import training_devices
from fedhpc.job.run_files import SPENT
from fedhpc.methods import ServerState
from fedhpc.methods.updates import RoundUploads, Sums, Vector
from fedhpc.privacy.accounting import Costs, Sampling, calibrate, costs
from fedhpc.privacy.clipping import next_clip
from fedhpc.seeding import generator

CLIP = "clip"
"""C in the server's state and in a round's metrics, where it changes."""
SHORT = "short_changes"
"""Share of the devices whose change was no longer than C, with noise, in a round's metrics."""
NOT_TOLD = ("devices", "absent", "device_steps", "examples", "steps", "rejected", "device_accuracy")
"""What a line of the metrics says of single devices, or of who was sampled: on that nobody knows it the accounting
relies."""


@dataclass(frozen=True, kw_only=True)
class Mechanism:
    """The sum of m clipped vectors with noise N(0, (z C)^2) on each element, a function of seed and round."""

    config: PrivacyConfig
    seed: int
    devices: Sequence[int]
    """Those that can be sampled."""
    sampling: Sampling
    noise: float
    """z."""
    costs: Costs

    def clip(self, server: ServerState) -> float:
        """C of the round after a state's."""
        clip = self.config.clip
        assert clip is not None
        return server.scalars.get(CLIP, clip)

    def epsilon(self, released: int) -> float:
        """What so many rounds cost in which something was released."""
        return self.costs.epsilon(released)

    def is_spent(self, released: int) -> bool:
        """Whether the round after so many would pass the budget."""
        return self.config.epsilon is not None and self.epsilon(released + 1) > self.config.epsilon

    def affordable(self, rounds: int) -> int:
        """How many of so many rounds the budget has room for."""
        if self.config.epsilon is None:
            return rounds
        return bisect_right(range(1, rounds + 1), self.config.epsilon, key=self.epsilon)

    def release(
        self,
        uploads: RoundUploads,
        added: NDArray[np.float64],
        server: ServerState,
        origin: Vector,
        steps: Sequence[int],
    ) -> tuple[RoundUploads, dict[str, Any]]:
        """A round's uploads as the method may see them, and what the metrics say of their clipping.

        Devices that are missing add no change, and leave C as it is; the sum is divided by m all the same. The method's
        two sums are one under uniform weights: noise is drawn once. Nothing tells who was sampled, so neither do the
        steps they took.

        Args:
            uploads: of the devices that took part and sent sound ones.
            added: the sums [k, n], or with a flag of each device behind [k, n + 1].
            server: the state before the round.
            origin: what a device adds that has found nothing new [n].
            steps: K_i of every device.
        """
        clip, m, present = self.clip(server), self.sampling.sampled, len(uploads.device_ids)
        total = added[0, : origin.size]
        if present < m:
            total = total + (m - present) * origin.astype(np.float64)
        if self.noise:
            total = total + self.noise * clip * self._draw("privacy noise", server.round, origin.size)
            uploads = replace(uploads, num_steps=np.full(present, np.mean([steps[device] for device in self.devices])))
        uploads = replace(uploads, sums=Sums(mean=total / m, total=total if len(added) > 1 else None))
        if self.config.quantile is None:
            return uploads, {}
        (noise,) = self.sampling.count_noise(self.noise) * self._draw("privacy count", server.round, 1)
        count = added[0, -1] + (m - present) * self.config.quantile + noise
        return uploads, {CLIP: clip, SHORT: float(count) / m}

    def after(self, server: ServerState, record: Mapping[str, Any]) -> ServerState:
        """The state with C of the next round, from what the round's metrics say."""
        if self.config.quantile is None:
            return server
        clip = next_clip(record[CLIP], record[SHORT], self.config.quantile)
        return replace(server, scalars={**server.scalars, CLIP: clip})

    def told(self, record: Mapping[str, Any], released: int) -> dict[str, Any]:
        """A round's metrics without what single devices have computed, with what all rounds up to it have cost."""
        epsilon = self.epsilon(released)
        spent = {SPENT: self.config.epsilon} if self.is_spent(released) else {}
        told = {key: value for key, value in record.items() if key not in NOT_TOLD}
        return told | spent | {"loss": None, "epsilon": epsilon if math.isfinite(epsilon) else None}

    def describe(self, rounds: int) -> str:
        """Noise, clip, sample and costs of so many rounds, in words."""
        asked, clip, delta = self.sampling, self.config.clip, self.config.delta
        follows = "" if self.config.quantile is None else f", then the {self.config.quantile:g} quantile"
        known = self.affordable(rounds)
        end = f"epsilon {self.epsilon(known):.4g} at delta {delta:g} in the end"
        if known < rounds:
            end += f", which is after {known}: the next one would pass the budget of {self.config.epsilon:g}"
        return (
            f"noise z {self.noise:.4g}, clip C {clip:g}{follows}, {asked.sampled} of {asked.num_devices} devices a "
            f"round, {rounds} rounds: {end}"
        )

    def describe_end(self, released: int, rounds: int) -> str:
        """That the run ends after so many of its rounds, in words."""
        so_far, then = self.epsilon(released), self.epsilon(released + 1)
        return (
            f"the budget is spent: {released} of {rounds} rounds have cost epsilon {so_far:.4g}, another one would "
            f"make it {then:.4g}, and privacy.epsilon is {self.config.epsilon:g}"
        )

    def _draw(self, purpose: str, round_index: int, count: int) -> NDArray[np.float64]:
        return generator(self.seed, purpose=purpose, round_index=round_index).standard_normal(count)


def make_mechanism(config: Config) -> Mechanism | None:
    """The mechanism that a run's section `privacy` asks for; None if it asks for none.

    Raises:
        ConfigError: the budget is too small for a round, or dp_accounting is not installed.
    """
    privacy, rounds = config.privacy, config.federation.rounds
    if not privacy.is_on:
        return None
    devices = training_devices(config)
    sampling = Sampling(
        num_devices=len(devices),
        sampled=config.federation.devices_per_round,
        with_count=privacy.quantile is not None,
    )
    noise = privacy.noise
    if noise is None:
        assert privacy.epsilon is not None  # the configuration asks for one of them
        noise = calibrate(privacy.epsilon, privacy.delta, sampling, rounds)
    found = costs(noise, sampling, privacy.delta)
    mechanism = Mechanism(
        config=privacy, seed=config.seed, devices=devices, sampling=sampling, noise=noise, costs=found
    )
    if not mechanism.affordable(1):
        raise ConfigError(
            f"privacy.epsilon: {privacy.epsilon:g} is less than one round costs with privacy.noise: {noise:g} "
            f"({mechanism.epsilon(1):.4g}); give more of one of them"
        )
    return mechanism
