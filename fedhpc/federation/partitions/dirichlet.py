"""Class mixes from a Dirichlet distribution, as in the released code of FedPepTAO.

Device sizes are from Dirichlet(5, ..., 5), class mixes from Dirichlet(alpha); examples are drawn without replacement.
"""

import numpy as np

from fedhpc.config.sections import FederationConfig, PositiveFloat
from fedhpc.federation.partition import Partitioner, dirichlet_sizes, owners_by_mix
from fedhpc.registry import PARTITIONS


@PARTITIONS.register("dirichlet")
class Dirichlet(Partitioner):
    """Each device with a class mix of its own."""

    class Config(FederationConfig):
        """Keys."""

        alpha: PositiveFloat = 1.0
        """Concentration of the class mix; smaller is further from iid."""

    strength = "alpha"
    by_group = True

    def owners(self, labels: np.ndarray, num_classes: int) -> np.ndarray:
        """See `Partitioner`."""
        num_devices = self.config.num_devices
        sizes = dirichlet_sizes(len(labels), num_devices, self.rng("sizes"))
        mixes = self.rng("mixes").dirichlet(np.full(num_classes, self.config.alpha), num_devices)
        return owners_by_mix(labels, sizes, mixes, self.rng("train"))
