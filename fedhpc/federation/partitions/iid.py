"""Examples at random, as many on each device."""

import numpy as np

from fedhpc.federation.partition import Partitioner, even_sizes, owners_in_order
from fedhpc.registry import PARTITIONS


@PARTITIONS.register("iid")
class Iid(Partitioner):
    """All devices alike."""

    def owners(self, labels: np.ndarray, num_classes: int) -> np.ndarray:
        """See `Partitioner`."""
        order = self.rng("order").permutation(len(labels))
        return owners_in_order(order, even_sizes(len(labels), self.config.num_devices))
