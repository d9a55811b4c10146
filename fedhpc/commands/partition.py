"""`fedhpc partition`: how a prepared data set is divided among devices, as a table and, with --out, a picture."""

import argparse
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedhpc.config import Config, least_values
from fedhpc.config.file import check_values
from fedhpc.data.prepared import PreparedData
from fedhpc.errors import ConfigError, DataError
from fedhpc.federation.partition import Groups, Partition, divide, group_counts, label_skew
from fedhpc.federation.sampling import held_out_devices
from fedhpc.files import check_target, write_target
from fedhpc.model.pretrained import load_tokenizer
from fedhpc.model.word_embeddings import WordEmbeddings
from fedhpc.registry import PARTITIONS

PICTURES = (".png", ".svg", ".pdf")
SHOWN_DEVICES = 8
SHOWN_LETTERS = 100


def table(partition: Partition, held_out: Sequence[int], names: Sequence[str], train: np.ndarray) -> list[list[str]]:
    """One line for each device: examples of each group in training, if there are several, and validation examples."""
    columns: dict[str, Any] = {"device": range(len(train))}
    if partition.names:
        columns["name"] = partition.names
    if held_out:
        columns["held out"] = ["yes" if device in held_out else "no" for device in range(len(train))]
    columns["examples"] = train.sum(axis=1)
    several = list(zip(names, train.T, strict=True)) if len(names) > 1 else []
    header = [*columns, *(name for name, _ in several), "validation"]
    cells = [*columns.values(), *(counts for _, counts in several), map(len, partition.validation)]
    return [header, *([str(cell) for cell in row] for row in zip(*cells, strict=True))]


def compact(lines: list[list[str]]) -> str:
    """The first devices of a table, aligned."""
    shown = lines[: 1 + SHOWN_DEVICES]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    text = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in shown]
    hidden = len(lines) - len(shown)
    return "\n".join([*text, f"... and {hidden} more devices (all of them with --table)"] if hidden else text)


def summary(partition: Partition, train: np.ndarray) -> str:
    """The whole partition in a few numbers."""
    sizes, evaluated = train.sum(axis=1), [len(own) for own in partition.validation]
    lines = [
        f"{len(sizes)} devices, {sizes.min()} to {sizes.max()} training examples (median {np.median(sizes):g}), "
        f"{min(evaluated)} to {max(evaluated)} for validation"
    ]
    if train.shape[1] > 1:
        one_class = int(((train > 0).sum(axis=1) == 1).sum())
        lines.append(
            f"label skew {label_skew(train):.3f} (0: all devices alike); {one_class} devices hold one class only"
        )
    return "\n".join([*lines, *filter(None, [partition.left_out])])


def described(groups: Groups, data: PreparedData, model: str) -> Iterator[str]:
    """A line for each group that a text stands for: its size, and how that text begins."""
    if not groups.examples:
        return
    tokenizer, split = load_tokenizer(model), data.split("train")
    sizes = np.bincount(groups.train, minlength=len(groups.names))
    for name, size, example in zip(groups.names, sizes, groups.examples, strict=True):
        tokens = split.tokens[split.offsets[example] : split.offsets[example + 1]]
        text = " ".join(tokenizer.decode(tokens.tolist(), skip_special_tokens=True).split())
        yield f"{name}: {size} examples, such as: {text[:SHOWN_LETTERS]}"


def draw(suffix: str, title: str, class_names: Sequence[str], train: np.ndarray) -> bytes:
    """A picture file of stacked bars: sizes above, class mixes below, devices from the largest to the smallest."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DataError("drawing needs matplotlib: pip install matplotlib") from error
    counts = train[np.argsort(-train.sum(axis=1), kind="stable")]
    figure = Figure(figsize=(10, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    _stack(above, counts, class_names)
    _stack(below, counts / counts.sum(axis=1, keepdims=True), class_names)
    below.margins(x=0.01)
    below.set_ylim(0, 1)
    whole = np.cumsum(counts.sum(axis=0) / counts.sum())[:-1]
    for height in whole:
        below.axhline(height, color="black", linewidth=1, linestyle="--")
    above.set_ylabel("training examples")
    below.set_ylabel("share of each class\n(dashed: whole data set)")
    below.set_xlabel(f"{len(counts)} devices, from the largest to the smallest")
    figure.suptitle(f"{title}; label skew {label_skew(train):.3f}", fontsize="medium")
    figure.legend(
        *above.get_legend_handles_labels(), loc="outside right upper", title="class", frameon=False, reverse=True
    )
    image = io.BytesIO()
    figure.savefig(image, format=suffix.removeprefix("."), dpi=120)
    return image.getvalue()


def _stack(axes: Any, heights: np.ndarray, class_names: Sequence[str]) -> None:
    bottoms = np.cumsum(heights, axis=1) - heights
    for index, name in enumerate(class_names):
        axes.bar(range(len(heights)), heights[:, index], width=0.9, bottom=bottoms[:, index], label=name)
    axes.spines[["top", "right"]].set_visible(False)


def _settings(arguments: argparse.Namespace) -> Config:
    """The configuration that the arguments give; ConfigError with all that is wrong."""
    given = {key: getattr(arguments, key) for key in ("num_devices", "partition", "alpha", "shards_per_device")}
    federation = {key: value for key, value in given.items() if value is not None}
    values = {**least_values(), "seed": arguments.seed, "federation": federation}
    config, problems = check_values(values, arguments.set)
    if config is None:
        raise ConfigError("; ".join(problems))
    return config


def preview(arguments: argparse.Namespace) -> Iterator[str]:
    """Divide, draw and write; yields what is to be printed."""
    if arguments.out and Path(arguments.out).suffix not in PICTURES:
        raise DataError(f"--out {arguments.out}: must end in one of {', '.join(PICTURES)}")
    for file in filter(None, (arguments.out, arguments.table)):
        check_target(Path(file))
    data = PreparedData.open(arguments.data, verify=False)
    config, model = _settings(arguments), data.description.model
    partition = divide(data, config.federation, config.seed, WordEmbeddings(model))
    assert partition.groups is not None
    names, train = group_counts(partition)
    lines = table(partition, held_out_devices(config), names, train)
    yield compact(lines)
    yield summary(partition, train)
    yield from described(partition.groups, data, model)
    if arguments.table:
        write_target(Path(arguments.table), "".join("\t".join(line) + "\n" for line in lines).encode())
        yield f"table: {arguments.table}"
    if arguments.out:
        federation = config.federation
        key = PARTITIONS[federation.partition].strength
        strength = f" {key} {getattr(federation, key):g}" if key else ""
        title = f"{data.description.task}: {federation.partition}{strength}, seed {config.seed}"
        write_target(Path(arguments.out), draw(Path(arguments.out).suffix, title, names, train))
        yield f"picture: {arguments.out}"
