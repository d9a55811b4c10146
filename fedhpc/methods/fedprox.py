"""FedProx: the devices' loss grows with the distance from the global parameters.

Federated Optimization in Heterogeneous Networks. Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith. MLSys 2020.
https://arxiv.org/abs/1812.06127, equation 2: F_i(P) + mu / 2 |P - P^t|^2.
"""

from collections.abc import Mapping

from fedhpc.config.sections import MethodConfig, NonNegativeFloat
from fedhpc.methods.base import LocalRule
from fedhpc.methods.fedavg import FedAvg
from fedhpc.methods.updates import Vector
from fedhpc.registry import METHODS


@METHODS.register("fedprox")
class FedProx(FedAvg):
    """At the server FedAvg."""

    class Config(MethodConfig):
        """Keys."""

        proximal: NonNegativeFloat = 0.01
        """mu, of the proximal term."""

    def local_rule(self, sent: Mapping[str, Vector], kept: Mapping[str, Vector]) -> LocalRule:
        """The proximal term."""
        return LocalRule(proximal=self.config.proximal)
