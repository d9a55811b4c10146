"""An experiment's YAML file: its keys, and what is wrong with them."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError
from pydantic_core import ErrorDetails

from fedhpc.config.file import apply_override, read_yaml
from fedhpc.config.sections import PathName, Positive, PositiveFloat, Section
from fedhpc.data.generation_tokens import Overlong
from fedhpc.data.tasks import Head
from fedhpc.errors import ConfigError

Settings = dict[str, Any]
"""Dotted key -> value. The key `base` stands for the configuration file that the others change."""
PREPARE = "prepare."
"""Beginning of keys that `--set` changes in the experiment, not in its cells."""


class Preparation(Section):
    """What to prepare before the cells run."""

    path: PathName
    """The folder, `data.path` of the cells that use it."""
    source: PathName
    task: PathName | None = None
    """A built-in task or a task file; the entry's name unless given."""
    model: PathName | None = None
    """What the cells have unless given, as `head`."""
    head: Head | None = None
    overlong: Overlong | None = None
    """What becomes of texts to be generated that are too long."""
    max_length: Positive = 128
    limit_train: Positive | None = None
    seed: int = 42
    validation: Annotated[str, Field(min_length=1)] | None = None
    """The source's split that devices are evaluated on."""


class ExperimentFile(Section):
    """What stands in the file."""

    base: str | None = None
    """The configuration that all cells start from, relative to this file; an axis may choose it instead."""
    out: PathName
    """A folder: each cell has its run directory in it."""
    prepare: Annotated[dict[str, Preparation], Field(default_factory=dict)]
    """Name -> what to prepare, once, if a cell needs it."""
    needs: Annotated[list[PathName], Field(default_factory=list)]
    """Experiment files, relative to this one: their cells run before, and are exported for these cells."""
    settings: Annotated[Settings, Field(alias="set", default_factory=dict)]
    """Settings of all cells; the grid comes after them."""
    grid: Annotated[
        dict[
            str,
            Annotated[list[Any], Field(min_length=1)]
            | Annotated[dict[str | int | float, Settings | None], Field(min_length=1)],
        ],
        Field(min_length=1),
    ]
    """Axis -> values of the key of that name, or names for several keys at once."""
    exclude: Annotated[list[Settings], Field(default_factory=list)]
    """Cells that have all values of an entry are left out."""
    launch: str | None = None
    """What starts the ranks of a cell; one process unless given."""
    target: PositiveFloat | None = None
    """The accuracy, or leading score, whose cost the report compares."""
    budget_bytes: PositiveFloat | None = None
    """Where the tables cut each cell's curve: at the last round until which no more bytes were moved."""
    reference: PathName | None = None
    """Published figures, a CSV file relative to this one, that the report sets beside the cells'."""


def read_experiment(path: Path, overrides: Sequence[str], out: str | None) -> tuple[ExperimentFile, dict[str, str]]:
    """The file, and where an override has moved prepared data: folder that the file names -> folder.

    Args:
        overrides: those of `prepare.` count, where the file has the entry.
        out: instead of the file's.

    Raises:
        ConfigError: with all that is wrong.
    """
    values = read_yaml(path)
    if not {"out", "grid"} & values.keys():
        raise ConfigError(
            f"{path}: is no experiment: it has neither grid: nor out:; configurations are for `fedhpc run`"
        )
    before = _validated(path, values)
    ours = [text for text in overrides if entry_of(text) in before.prepare]
    if problems := [problem for text in ours if (problem := apply_override(values, text))]:
        raise refusal(path, problems)
    file = _validated(path, values if out is None else {**values, "out": out})
    places = {old.path: file.prepare[name].path for name, old in before.prepare.items()}
    return file, {place(old): new for old, new in places.items() if old != new}


def place(path: str | Path) -> str:
    """The same for every name of a folder, relative, through links, or there or not."""
    return os.path.realpath(path)


def key_of(override: str) -> str:
    """The dotted key of `key.sub=value`."""
    return override.partition("=")[0].strip()


def entry_of(override: str) -> str | None:
    """The entry of `prepare:` that an override changes, if it does."""
    key = key_of(override)
    return key.removeprefix(PREPARE).partition(".")[0] if key.startswith(PREPARE) else None


def refusal(path: Path, problems: Iterable[str]) -> ConfigError:
    """All that is wrong with an experiment."""
    found = list(problems)
    return ConfigError("\n  ".join([f"{path}: {len(found)} problem(s)", *found]))


def _validated(path: Path, values: Mapping[str, Any]) -> ExperimentFile:
    try:
        return ExperimentFile.model_validate(values)
    except ValidationError as error:
        raise refusal(path, dict.fromkeys(_describe(details, values) for details in error.errors())) from None


def _describe(details: ErrorDetails, values: Mapping[str, Any]) -> str:
    key, message = ".".join(map(str, details["loc"])), details["msg"]
    if details["type"] == "model_type":
        return f"{key}: should hold keys and values, found {details['input']!r}"
    if details["type"] == "extra_forbidden":
        section = ExperimentFile if len(details["loc"]) == 1 else Preparation
        valid = [field.alias or name for name, field in section.model_fields.items()]
        return f"{key}: unknown key; valid here: {', '.join(valid)}"
    if details["type"] == "missing":
        return f"{key}: is required"
    if details["loc"][0] == "grid" and len(details["loc"]) > 1:
        axis = details["loc"][1]
        wanted = "a list of values, or names with what each sets: {NAME: {KEY: VALUE}}"
        return f"grid.{axis}: should be {wanted}; found {values['grid'].get(axis)!r}"
    return f"{key}: {message[0].lower()}{message[1:]}, found {details['input']!r}".replace("input should", "should")
