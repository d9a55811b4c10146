"""The files that `fedhpc init` reads, and those that it writes."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedhpc.config import Config
from fedhpc.data.readers import Record, read_table
from fedhpc.data.sources import find_source, refuse_pickle
from fedhpc.data.tasks import GENERATION_TASKS, SPLITS, TASKS
from fedhpc.errors import ConfigError, DataError
from fedhpc.job.job_files import COMMAND, TEMPLATES
from fedhpc.yaml_files import write

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
TWO_FILES = "give a folder with train.tsv and dev.tsv (or .csv, .jsonl, .parquet), or two such files of one folder"
DEVICES, EXAMPLES_EACH = 20, 10
"""So many devices, but none with fewer examples on average."""
LENGTH_STEP = 16
"""Tokens; the longest text is rounded up to a multiple."""
LONG = 128
"""Tokens of a text that is shortened if it is among the longest hundredth."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A user's files: one for training, and one for validation unless it is to be taken from that."""

    folder: Path
    files: Mapping[str, str]
    """Split -> name in the folder."""

    @property
    def train(self) -> Path:
        """The training examples' file."""
        return self.folder / self.files["train"]


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What a look at the data has found: what goes into the files, and what the user is told."""

    examples: str
    """How many, in words."""
    files: str
    """Which ones, in words."""
    lines: list[str]
    """What they are."""
    templates: tuple[str, str]
    """Of the task's and the run's file."""
    values: Mapping[str, str]
    """What those say, by the name of the place."""
    config: Config
    """The run, as far as it depends on the data."""
    options: list[str]
    """Of `fedhpc prepare`."""
    after: list[str]
    """What can be done after the run, in lines."""


def new_files(name: str) -> list[Path]:
    """The files to write, of which none is there yet.

    Raises:
        ConfigError: one is, or they cannot be called so.
    """
    is_built_in = name in TASKS or name in GENERATION_TASKS
    if not NAME.fullmatch(name) or is_built_in:
        taken = f"is a built-in task (fedhpc prepare --task {name})" if is_built_in else "is no name for files"
        raise ConfigError(f"{name!r} {taken}; give one of letters, digits, '.', '_' and '-'")
    targets = [Path(f"{name}{end}") for end in (".task.yaml", ".yaml", ".slurm")]
    for target in targets:
        if target.exists() or target.is_symlink():
            raise ConfigError(f"{target} is there already and is not overwritten; remove it, or give another name")
    return targets


def find_files(data: Sequence[str]) -> Source:
    """The files of the training and, if there are any, the validation examples.

    Raises:
        DataError: there are none, or they are in two folders.
    """
    paths = [Path(name).expanduser() for name in data]
    for path in paths:
        if not path.exists():
            raise DataError(f"--data {path}: there is no such file or folder; {TWO_FILES}")
    if len(paths) == 1 and paths[0].is_dir():
        return _in_folder(paths[0])
    if len(paths) > 2 or not all(path.is_file() for path in paths) or paths[0].parent != paths[-1].parent:
        raise DataError(f"--data {' '.join(map(str, paths))}: {TWO_FILES}")
    for path in paths:
        refuse_pickle(path)
    return Source(folder=paths[0].parent, files=dict(zip(SPLITS, (path.name for path in paths), strict=False)))


def _in_folder(folder: Path) -> Source:
    has_validation = any((folder / name).is_file() for name in SPLITS["validation"])
    found = find_source(str(folder), SPLITS if has_validation else {"train": SPLITS["train"]})
    if found is None:
        raise DataError(f"--data {folder}: a folder of datasets.save_to_disk; {TWO_FILES}")
    return Source(folder=folder, files={split: file.name for split, file in found.items()})


def read_records(file: Path) -> list[Record]:
    """All examples of a file.

    Raises:
        DataError: one is malformed, or there are none.
    """
    records = read_table(file)
    read: list[Record] = []
    try:
        for record in records.each:
            read.append(record)
    except ValueError as error:
        raise DataError(f"{records.place(len(read))}: {error}") from None
    if not read:
        raise DataError(f"{file} holds no examples")
    return read


def write_files(name: str, targets: Sequence[Path], found: Findings) -> int:
    """Write all of them; the ranks that the job is for."""
    ranks = 1 + found.config.federation.devices_per_round
    values = {
        "NAME": name,
        "EXAMPLES": found.examples,
        "CONFIG": str(targets[1]),
        "RANKS": str(ranks),
        "COMMAND": COMMAND,
        "TEMPLATES": str(TEMPLATES),
        "TASK": block({"task": name}),
        "RUN_DIR": block({"run_dir": found.config.run_dir}),
        "MODEL": block({"model": {"name": found.config.model.name}}),
        "DATA": block({"data": {"path": found.config.data.path, "task": name}}),
        **found.values,
    }
    for target, template in zip(targets, (*found.templates, "run.slurm"), strict=True):
        with target.open("x", encoding="utf-8") as file:
            file.write(filled(template, values))
    return ranks


def filled(template: str, values: Mapping[str, str]) -> str:
    """A template's text, with a value for each @NAME@."""
    text = (TEMPLATES / template).read_text(encoding="utf-8")
    return re.sub("@([A-Z_]+)@", lambda match: values[match[1]], text)


def basic_config(name: str, model: str, **sections: dict[str, Any]) -> Config:
    """A run of these names."""
    common = {
        "run_dir": f"runs/{name}",
        "model": {"name": model},
        "data": {"path": f"prepared/{name}", "task": name},
    }
    return Config.model_validate({**common, **sections})


def usual_devices(num_train: int) -> int:
    """How many devices so many training examples are divided among."""
    return max(1, min(DEVICES, num_train // EXAMPLES_EACH))


def usual_length(tokens: np.ndarray) -> int:
    """Tokens that texts are cut to, where the model has places enough."""
    return rounded_up(max(int(np.percentile(tokens, 99)), min(int(tokens.max()), LONG)))


def rounded_up(tokens: int) -> int:
    """A multiple of the step."""
    return LENGTH_STEP * -(-tokens // LENGTH_STEP)


def spread(numbers: np.ndarray) -> str:
    """The middle and the end of some numbers, in words."""
    return f"{int(np.median(numbers))} (longest {numbers.max()})"


def printed(text: str) -> str:
    """A name within a line."""
    return text if text.isprintable() else ascii(text)


def block(values: dict[str, Any]) -> str:
    """Values as YAML."""
    return write(values).rstrip("\n")
