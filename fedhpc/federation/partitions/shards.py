"""Shards of one class each, so many on every device.

Communication-Efficient Learning of Deep Networks from Decentralized Data. McMahan, Moore, Ramage, Hampson, Agüera y
Arcas. AISTATS 2017. https://arxiv.org/abs/1602.05629, section 3.
"""

import numpy as np

from fedhpc.config.sections import FederationConfig, Positive
from fedhpc.federation.partition import Partitioner, even_sizes, owners_in_order
from fedhpc.registry import PARTITIONS


@PARTITIONS.register("shards")
class Shards(Partitioner):
    """Examples sorted by class, cut into equal shards, random shards to each device."""

    class Config(FederationConfig):
        """Keys."""

        shards_per_device: Positive = 2
        """Shards of one class each on a device."""

    strength = "shards_per_device"
    by_group = True

    @property
    def examples_per_device(self) -> int:  # type: ignore[override]
        """See `Partitioner`."""
        return int(self.config.shards_per_device)

    def describe_need(self) -> tuple[str, str]:
        """See `Partitioner`."""
        per_device = self.config.shards_per_device
        return f"{self.config.num_devices} devices with {per_device} shards each", ", or fewer shards_per_device"

    def owners(self, labels: np.ndarray, num_classes: int) -> np.ndarray:
        """See `Partitioner`."""
        per_device = self.config.shards_per_device
        num_shards = self.config.num_devices * per_device
        order = self.rng("order").permutation(len(labels))
        by_label = order[np.argsort(labels[order], kind="stable")]
        shards = owners_in_order(by_label, even_sizes(len(labels), num_shards))
        return self.rng("shards").permutation(num_shards)[shards] // per_device
