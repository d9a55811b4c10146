"""Class mixes of the devices: a run's partition once more, from the prepared data."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from fedhpc.commands.report.runs import Run
from fedhpc.config import section_of
from fedhpc.errors import UserError
from fedhpc.federation.partition import divide, group_counts, label_skew
from fedhpc.registry import PARTITIONS


@dataclass(frozen=True, kw_only=True)
class ClassMix:
    """Training examples of every device by class."""

    setting: str
    class_names: list[str]
    counts: np.ndarray
    """[devices, classes], from the largest device to the smallest."""
    device_ids: list[int]
    skew: float
    """See `fedhpc.federation.partition.label_skew`."""


def partition_setting(run: Run) -> str:
    """The partition in words; equal words of runs on the same data and seed are equal partitions."""
    kind = str(run.config.get("federation.partition"))
    key = PARTITIONS[kind].strength if kind in PARTITIONS else None
    strength = f" {key} {run.config.get(f'federation.{key}')}" if key else ""
    return f"{run.config.get('federation.num_devices')} devices, {kind}{strength}"


def class_mix(run: Run) -> ClassMix:
    """What the run's devices hold.

    Raises:
        UserError: the prepared data are not there any more, or cannot be divided as configured.
    """
    # They import torch, which nothing else in a report needs.
    from fedhpc.data.prepared import PreparedData  # noqa: PLC0415
    from fedhpc.model.word_embeddings import WordEmbeddings  # noqa: PLC0415

    config = run.config
    data = PreparedData.open(Path(str(config["data.path"])), verify=False)
    words = WordEmbeddings(str(config.get("model.name")))
    try:
        keys = {key.partition(".")[2]: value for key, value in config.items() if key.startswith("federation.")}
        partition = divide(data, section_of(PARTITIONS, **keys), config["seed"], words)
    except (KeyError, TypeError, ValidationError) as error:
        raise UserError(f"{run.path}: the configuration says too little about the partition: {error}") from None
    names, counts = group_counts(partition)
    order = np.argsort(-counts.sum(axis=1), kind="stable")
    return ClassMix(
        setting=f"{partition_setting(run)}, seed {run.seed}",
        class_names=list(names),
        counts=counts[order],
        device_ids=order.tolist(),
        skew=label_skew(counts),
    )
