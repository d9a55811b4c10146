"""What bad devices do, and which devices are bad."""

from abc import ABC
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from fedhpc.config import Config
from fedhpc.config.sections import AttackConfig, Fraction, Part, PositiveFloat, share_of
from fedhpc.federation.sampling import training_devices
from fedhpc.methods.updates import Vector
from fedhpc.registry import ATTACKS
from fedhpc.seeding import generator


class BadDevicesConfig(AttackConfig):
    """Of attacks by some of the devices."""

    share: Fraction = 0.1
    """Share of the devices that can train which are bad, rounded down but at least one; the seed draws them."""


class ScaledConfig(BadDevicesConfig):
    """Of attacks that change what bad devices send."""

    scale: PositiveFloat = 1.0
    """How many times as long as its honest change a bad device's change is. What no local update can reach is rejected
    (`server.max_rejected`)."""


class Attack(Part, ABC):
    """What a bad device does otherwise than the others; pure, all randomness comes in.

    Args:
        config: its Config, the section `attack`.
    """

    Config: ClassVar[type[AttackConfig]] = BadDevicesConfig

    def __init__(self, config: Any) -> None:
        self.config = config

    def labels(self, labels: np.ndarray, num_classes: int) -> np.ndarray:
        """The classes [n] that it trains on in place of those of its examples."""
        return labels

    def upload(self, params: Vector, start: Vector, rng: np.random.Generator) -> Vector:
        """What it sends [n] in place of P_i.

        Args:
            params: P_i, which stays as it is.
            start: P^t.
            rng: of this device in this round.
        """
        return params


def make_attack(config: Config) -> Attack:
    """The attack that a configuration's section `attack` names."""
    attack: Attack = ATTACKS[config.attack.kind](config.attack)
    return attack


def bad_devices(config: Config) -> list[int]:
    """The devices that attack, ascending; the same in every round."""
    if not issubclass(config.parts["attack"].Config, BadDevicesConfig):
        return []
    devices = training_devices(config)
    count = share_of(config.attack.share, len(devices))  # type: ignore[attr-defined]
    return sorted(generator(config.seed, purpose="bad devices").permutation(devices)[:count].tolist())


def attacked_labels(config: Config, labels: np.ndarray, examples: Sequence[np.ndarray], num_classes: int) -> np.ndarray:
    """The classes [n] of all training examples, those of bad devices with what these make of them.

    Args:
        examples: of each device.
    """
    if bad := bad_devices(config):
        attack, labels = make_attack(config), np.array(labels)
        for device in bad:
            own = examples[device]
            labels[own] = attack.labels(labels[own], num_classes)
    return labels
