"""Bad devices send noise.

Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent. Blanchard, El Mhamdi, Guerraoui, Stainer.
NeurIPS 2017. https://arxiv.org/abs/1703.02757, section 5: Gaussian noise in place of the upload; there of a fixed
deviation, here as long as the device's change.
"""

import math

import numpy as np

from fedhpc.attack.attack import Attack, ScaledConfig
from fedhpc.methods.updates import Vector, distance
from fedhpc.registry import ATTACKS


@ATTACKS.register("noise")
class Noise(Attack):
    """P^t + scale |P_i - P^t| N(0, I / n)."""

    Config = ScaledConfig

    def upload(self, params: Vector, start: Vector, rng: np.random.Generator) -> Vector:
        """See `Attack`."""
        deviation = self.config.scale * distance(params, start) / math.sqrt(params.size)
        return start + np.float32(deviation) * rng.standard_normal(params.size, dtype=np.float32)
