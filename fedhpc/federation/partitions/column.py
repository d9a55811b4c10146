"""Natural devices: the values of a column of the texts, with what is theirs in both splits."""

from typing import TYPE_CHECKING, Literal

import numpy as np

from fedhpc.config.sections import FederationConfig, Positive
from fedhpc.errors import ConfigError
from fedhpc.federation.partition import NOBODY, Groups, Partition, Partitioner, Words
from fedhpc.registry import PARTITIONS

if TYPE_CHECKING:
    from fedhpc.data.prepared import PreparedData


@PARTITIONS.register("column")
class Column(Partitioner):
    """A device for each value of the column that the task file calls `device`."""

    class Config(FederationConfig):
        """Keys."""

        choose: Literal["largest", "sample"] = "largest"
        """Which values of the task's device column are devices where there are more than `num_devices`: those with most
        training examples, or some at random. The texts of the others belong to nobody."""
        min_examples: Positive = 1
        """Values with fewer training examples are left out."""

    natural = True

    def groups(self, data: "PreparedData", words: Words) -> Groups:
        """See `Partitioner`."""
        names = data.description.generation.get("devices", [])
        if len(names) < 2:
            found = f"name one alone, {names[0]!r}" if names else "name none"
            raise ConfigError(
                f"federation.partition: column takes the devices from a column of texts to be generated, and the data "
                f"{found}; name a column of several values under `device:` in the task file and run `fedhpc prepare` "
                "again, or use dirichlet, cluster, iid or quantity"
            )
        train, validation = (np.asarray(data.split(name).devices, np.int64) for name in ("train", "validation"))
        return Groups(train=train, validation=validation, names=names)

    def owners(self, labels: np.ndarray, num_classes: int) -> np.ndarray:
        """See `Partitioner`."""
        count, least = self.config.num_devices, self.config.min_examples
        sizes = np.bincount(labels, minlength=num_classes)
        enough = np.flatnonzero(sizes >= least)
        if len(enough) < count:
            valid = f"federation.num_devices of at most {len(enough)}"
            raise ConfigError(
                f"federation.num_devices: {count}, but {len(enough)} of the {num_classes} values of the device column "
                f"have federation.min_examples: {least} training examples or more; valid: "
                + (valid if len(enough) else f"federation.min_examples of at most {sizes.max()}")
            )
        if self.config.choose == "largest":
            chosen = enough[np.argsort(-sizes[enough], kind="stable")[:count]]
        else:
            chosen = self.rng("devices").choice(enough, count, replace=False)
        of_value = np.full(num_classes, NOBODY)
        of_value[np.sort(chosen)] = np.arange(count)
        return of_value[labels]

    def left_out(self, groups: Groups, partition: Partition) -> str:
        """See `Partitioner`."""
        sizes = np.bincount(groups.train, minlength=len(groups.names))
        few = np.count_nonzero(sizes < self.config.min_examples)
        others = len(sizes) - few - self.config.num_devices
        if not few + others:
            return ""
        nobodys = (
            f"{len(codes) - sum(map(len, parts))} of {len(codes)} {split} examples"
            for codes, parts, split in (
                (groups.train, partition.train, "training"),
                (groups.validation, partition.validation, "validation"),
            )
        )
        return (
            f"{len(sizes)} values of the device column: {few} with fewer than federation.min_examples: "
            f"{self.config.min_examples}, {others} not chosen (federation.choose: {self.config.choose}); "
            f"{' and '.join(nobodys)} belong to no device"
        )
