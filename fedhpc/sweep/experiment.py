"""An experiment file: a grid over configuration keys, and the cells it stands for, one run each."""

import copy
import hashlib
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError
from pydantic_core import ErrorDetails

from fedhpc.config import Config, PathName, PositiveFloat, Probability, Section, flatten
from fedhpc.config_file import KEYS, check_values, read_values, read_yaml, suggestion
from fedhpc.errors import ConfigError

Settings = dict[str, Any]
"""Dotted key -> value. The key `base` stands for the configuration file that the others change."""
FIGURES = (
    *("rounds", "accuracy", "accuracy_global", "best_accuracy_global", "bytes", "seconds"),
    *("best_accuracy", "seconds_slowest_device", "seconds_simulated", "deviation_last_five"),
)
"""Columns of results.csv behind the axes."""
LONGEST_NAME = 255 - len(".log")
"""Bytes of a cell's name: a folder and a log have it."""
DIGITS = 12
"""Of a digest."""
CELLS_NAMED = 4
"""So many cells are named beside a problem that several have."""


class ExperimentFile(Section):
    """What stands in the file."""

    base: str | None = None
    """The configuration that all cells start from, relative to this file; an axis may choose it instead."""
    out: PathName
    """A folder: each cell has its run directory in it."""
    settings: Annotated[Settings, Field(alias="set", default_factory=dict)]
    """For all cells; the grid comes after it."""
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
    target: Probability | None = None
    """The accuracy whose cost the report compares."""
    budget_bytes: PositiveFloat | None = None
    """Where the tables cut each cell's curve: at the last round until which no more bytes were moved."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of an experiment."""

    name: str
    values: Mapping[str, str]
    """Axis -> the name of its value, in the order of the file."""
    config_file: Path
    overrides: tuple[str, ...]
    config: Config

    @property
    def run_dir(self) -> Path:
        """Where the run writes."""
        return Path(self.config.run_dir)

    @property
    def arguments(self) -> list[str]:
        """What `fedhpc run` is given."""
        return [str(self.config_file), *(part for override in self.overrides for part in ("--set", override))]


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A grid, expanded and validated."""

    out: Path
    axes: tuple[str, ...]
    cells: tuple[Cell, ...]
    launch: str | None
    target: float | None
    budget_bytes: float | None

    def make_folder(self) -> None:
        """Make `out`.

        Raises:
            ConfigError: it cannot be made.
        """
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"out: {self.out} cannot be made: {error.strerror}; give a folder") from None

    @cached_property
    def digest(self) -> str:
        """Of the cells in their order and what they run: the tasks of a job array know theirs by its number."""
        cells = (f"{cell.name} {cell.config.sha256} {cell.config.federation.rounds}" for cell in self.cells)
        return hashlib.sha256("\n".join(cells).encode()).hexdigest()[:DIGITS]


def load_experiment(path: Path, overrides: Sequence[str] = (), out: str | None = None) -> Experiment:
    """Read an experiment file, expand its grid and validate every cell.

    Args:
        overrides: `key.sub=value`, for every cell.
        out: instead of the file's.

    Raises:
        ConfigError: with all that is wrong in any cell.
    """
    values = read_yaml(path)
    if not {"out", "grid"} & values.keys():
        raise ConfigError(
            f"{path}: is no experiment: it has neither grid: nor out:; configurations are for `fedhpc run`"
        )
    try:
        file = ExperimentFile.model_validate(values if out is None else {**values, "out": out})
    except ValidationError as error:
        raise _refusal(path, list(dict.fromkeys(_describe(details, values) for details in error.errors()))) from None
    axes = {name: _axis(name, given) for name, given in file.grid.items()}
    if problems := [*_axis_problems(file, axes), *_key_problems(file, axes, overrides)]:
        raise _refusal(path, problems)
    if not (cells := tuple(_cells(path, file, axes, overrides))):
        raise _refusal(path, ["exclude: leaves no cell of the grid"])
    return Experiment(
        out=Path(file.out),
        axes=tuple(axes),
        cells=cells,
        launch=file.launch,
        target=file.target,
        budget_bytes=file.budget_bytes,
    )


Axis = list[tuple[str, Settings]]
"""The names of an axis's values, and what each sets."""


def _axis(name: str, given: Any) -> Axis:
    if isinstance(given, list):
        return [(_label(value), flatten({name: value})) for value in given]
    return [(_label(label), flatten(settings or {})) for label, settings in given.items()]


def _label(value: Any) -> str:
    """A value as a part of a folder's name; several keys at once go by the first one's."""
    if isinstance(value, dict):
        return _label(next(iter(value.values()), "none"))
    if isinstance(value, list):
        return "+".join(map(_label, value))
    text = json.dumps(value) if value is None or isinstance(value, bool | float) else str(value)
    return re.sub(r"[^\w.+-]+", "-", text.rstrip("/").rpartition("/")[2].removesuffix(".yaml"))


def _axis_problems(file: ExperimentFile, axes: Mapping[str, Axis]) -> Iterator[str]:
    for name in sorted(axes.keys() & set(FIGURES)):
        yield f"grid.{name}: is a column of results.csv already; choose another name"
    for name in (name for name in axes if not name or re.search(r"[/\x00-\x1f]", name)):
        yield f"grid.{name!r}: becomes a part of folders' names; give one without '/' and control characters"
    for name, axis in axes.items():
        for label, count in Counter(label for label, _ in axis).items():
            if count > 1:
                yield f"grid.{name}: {count} values have the name {label!r}; name each: {{NAME: {{KEY: VALUE}}}}"
    for (one, left), (other, right) in itertools.combinations(axes.items(), 2):
        for key in sorted(_keys(left) & _keys(right)):
            yield f"grid: {one} and {other} both set {key}"
    if file.base is None and not any(all("base" in settings for _, settings in axis) for axis in axes.values()):
        yield "base: is required: the configuration file that all cells start from"


def _key_problems(file: ExperimentFile, axes: Mapping[str, Axis], overrides: Sequence[str]) -> Iterator[str]:
    varied = set().union(*map(_keys, axes.values()))
    given = {text.partition("=")[0].strip() for text in overrides}
    for key in sorted(key for key in given if any(f"{leaf}.".startswith(f"{key}.") for leaf in varied)):
        yield f"--set {key}: the grid varies it"
    if "run_dir" in {*varied, *given, *file.settings}:
        yield "run_dir: follows from out: and the cell's values; set neither it nor an axis of that name"
    for key in (key for entry in file.exclude for key in flatten(entry) if key not in (*axes, *KEYS)):
        yield f"exclude: {key}: neither an axis nor a key{suggestion(key)}"
    for key, wanted in (pair for entry in file.exclude for pair in flatten(entry).items()):
        labels = [label for label, settings in axes.get(key, ()) if key not in settings]
        for name in (name for name in _any_of(wanted) if labels and _label(name) not in labels):
            yield f"exclude: {key}: no value has the name {name!r}; there are {', '.join(labels)}"


def _keys(axis: Axis) -> set[str]:
    return {key for _, settings in axis for key in settings}


def _cells(path: Path, file: ExperimentFile, axes: Mapping[str, Axis], overrides: Sequence[str]) -> Iterator[Cell]:
    """Every cell that is not excluded.

    Raises:
        ConfigError: after the last one, with all problems and the cells that have them.
    """
    bases: dict[Path, dict[str, Any]] = {}
    problems: dict[str, list[str]] = {}
    short = _short_names(axes)
    for combination in itertools.product(*axes.values()):
        values = dict(zip(axes, (label for label, _ in combination), strict=True))
        settings = {"base": file.base, **flatten(file.settings)}
        for _, chosen in combination:
            settings |= chosen
        name = _folder_name(",".join(f"{short[axis]}={label}" for axis, label in values.items()))
        base = Path(os.path.normpath(path.parent / str(settings.pop("base"))))
        if base not in bases:
            bases[base] = read_values(base)
        texts = (*_overrides(settings), *overrides, *_overrides({"run_dir": f"{file.out}/{name}"}))
        resolved = copy.deepcopy(bases[base])
        config, found = check_values(resolved, texts)
        known = flatten(resolved) | (flatten(config.model_dump()) if config else {})
        if any(_matches(entry, known, values) for entry in file.exclude):
            continue
        for problem in found:
            problems.setdefault(problem, []).append(name)
        if config:
            yield Cell(name=name, values=values, config_file=base, overrides=texts, config=config)
    if problems:
        raise _refusal(path, (f"{problem} ({_some(names)})" for problem, names in problems.items()))


def _folder_name(name: str) -> str:
    """A cell's name as long as a file system takes it: of a longer one the beginning, and a digest of all of it."""
    data = name.encode(errors="surrogateescape")
    if len(data) <= LONGEST_NAME:
        return name
    digest = hashlib.sha256(data).hexdigest()[:DIGITS]
    return f"{data[: LONGEST_NAME - DIGITS - 1].decode(errors='ignore')}~{digest}"


def _overrides(settings: Settings) -> list[str]:
    return [f"{key}={json.dumps(value, ensure_ascii=False, default=str)}" for key, value in settings.items()]


def _short_names(axes: Mapping[str, Axis]) -> dict[str, str]:
    """The last part of each axis's key, or all of it where two are alike."""
    last = {name: name.rpartition(".")[2] for name in axes}
    counts = Counter(last.values())
    return {name: short if counts[short] == 1 else name for name, short in last.items()}


def _matches(entry: Settings, known: Settings, labels: Mapping[str, str]) -> bool:
    def has(key: str, wanted: Any) -> bool:
        is_value = key in known and (known[key] == wanted or known[key] in _any_of(wanted))
        return is_value or (key in labels and labels[key] in map(_label, _any_of(wanted)))

    return all(has(key, wanted) for key, wanted in flatten(entry).items())


def _any_of(wanted: Any) -> list[Any]:
    return wanted if isinstance(wanted, list) else [wanted]


def _some(names: Sequence[str]) -> str:
    more = len(names) - CELLS_NAMED
    return "cell " + "; ".join(names[:CELLS_NAMED]) + (f"; and {more} more" if more > 0 else "")


def _describe(details: ErrorDetails, values: Mapping[str, Any]) -> str:
    key, message = ".".join(map(str, details["loc"])), details["msg"]
    if details["type"] == "extra_forbidden":
        valid = [field.alias or name for name, field in ExperimentFile.model_fields.items()]
        return f"{key}: unknown key; valid here: {', '.join(valid)}"
    if details["type"] == "missing":
        return f"{key}: is required"
    if details["loc"][0] == "grid" and len(details["loc"]) > 1:
        axis = details["loc"][1]
        wanted = "a list of values, or names with what each sets: {NAME: {KEY: VALUE}}"
        return f"grid.{axis}: should be {wanted}; found {values['grid'].get(axis)!r}"
    return f"{key}: {message[0].lower()}{message[1:]}, found {details['input']!r}".replace("input should", "should")


def _refusal(path: Path, problems: Iterator[str] | Sequence[str]) -> ConfigError:
    found = list(problems)
    return ConfigError("\n  ".join([f"{path}: {len(found)} problem(s)", *found]))
