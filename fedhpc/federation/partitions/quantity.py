"""Examples at random; sizes from Dirichlet(5, ..., 5)."""

import numpy as np

from fedhpc.federation.partition import Partitioner, dirichlet_sizes, owners_in_order
from fedhpc.registry import PARTITIONS


@PARTITIONS.register("quantity")
class Quantity(Partitioner):
    """Devices that differ in how much they have, not in what."""

    def owners(self, labels: np.ndarray, num_classes: int) -> np.ndarray:
        """See `Partitioner`."""
        order = self.rng("order").permutation(len(labels))
        return owners_in_order(order, dirichlet_sizes(len(labels), self.config.num_devices, self.rng("sizes")))
