"""Ditto: FedAvg, and beside it a model of its own for every device, held close to the global one.

Ditto: Fair and Robust Federated Learning Through Personalization. Li, Hu, Beirami, Smith. ICML 2021.
https://arxiv.org/abs/2012.04221, algorithm 1. Both take the same steps on the same batches, by the device's optimizer.
"""

from typing import Any

from fedhpc.config.sections import MethodConfig, NonNegativeFloat
from fedhpc.errors import ConfigError
from fedhpc.methods.base import LocalRule
from fedhpc.methods.fedavg import FedAvg
from fedhpc.registry import METHODS


@METHODS.register("ditto")
class Ditto(FedAvg):
    """v_i goes along the gradient of f_i(v) + lambda / 2 |v - P^t|^2, from round to round; P as FedAvg's."""

    class Config(MethodConfig):
        """Keys."""

        pull: NonNegativeFloat = 1.0
        """How strongly a device's own model is held to the global one, lambda."""

    has_personal = True

    @classmethod
    def check(cls, config: Any) -> None:
        """See `FedAvg`; nothing else may be trained at home."""
        super().check(config)
        selection = config.selection
        if config.exchange.keep:
            raise ConfigError("server.method: ditto trains all of a device's own model; it needs exchange.keep: []")
        if config.parts["selection"].needs_layers and selection.ratio != 1 and selection.local_layers == "trained":
            raise ConfigError(
                "server.method: ditto trains all of a device's own model; it needs selection.strategy: all, or "
                "selection.local_layers: frozen"
            )

    def personal_rule(self) -> LocalRule:
        """See `Method`."""
        return LocalRule(proximal=self.config.pull)
