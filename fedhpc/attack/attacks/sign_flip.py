"""Bad devices send the opposite of what they have learned.

RSA: Byzantine-Robust Stochastic Aggregation Methods for Distributed Learning from Heterogeneous Datasets. Li, Xu, Chen,
Giannakis, Ling. AAAI 2019. https://arxiv.org/abs/1811.03761, section 5, of the change of a round in place of a vector.
"""

import numpy as np

from fedhpc.attack.attack import Attack, ScaledConfig
from fedhpc.methods.updates import Vector
from fedhpc.registry import ATTACKS


@ATTACKS.register("sign_flip")
class SignFlip(Attack):
    """P^t - scale (P_i - P^t)."""

    Config = ScaledConfig

    def upload(self, params: Vector, start: Vector, rng: np.random.Generator) -> Vector:
        """See `Attack`."""
        return start - np.float32(self.config.scale) * (params - start)
