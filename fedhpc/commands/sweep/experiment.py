"""An experiment file: a grid over configuration keys, and the cells it stands for, one run each."""

import copy
import hashlib
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fedhpc.commands.sweep.experiment_file import (
    PREPARE,
    ExperimentFile,
    Preparation,
    Settings,
    entry_of,
    key_of,
    place,
    read_experiment,
    refusal,
)
from fedhpc.config import Config, flatten
from fedhpc.config.file import check_values, known_keys, read_values, suggestion
from fedhpc.errors import ConfigError
from fedhpc.registry import load_plugins

FIGURES = (
    *("rounds", "accuracy", "accuracy_global", "best_accuracy_global", "bytes", "seconds"),
    *("best_accuracy", "seconds_slowest_device", "seconds_simulated", "deviation_last_five"),
)
"""Columns of results.csv behind the axes."""
LONGEST_NAME = 255 - len(".log")
"""Bytes of a cell's name: a folder and a log have it."""
DIGITS = 12
"""How many digits of a digest are shown."""
EXPORT = "peft"
NEEDED = "needs"
"""Folder in `--out` of the experiments that this one needs."""
CELLS_NAMED = 4
"""So many cells are named beside a problem that several have."""


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
    def export(self) -> Path:
        """Where its prompts are exported to, for the cells of an experiment that needs it."""
        return self.run_dir / EXPORT

    @property
    def arguments(self) -> list[str]:
        """What `fedhpc run` is given."""
        return [str(self.config_file), *(part for override in self.overrides for part in ("--set", override))]


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A grid, expanded and validated."""

    path: Path
    """The file."""
    options: tuple[str, ...]
    """Options of the command line that made these cells of the file."""
    out: Path
    axes: tuple[str, ...]
    cells: tuple[Cell, ...]
    prepare: Mapping[str, Preparation]
    needs: tuple["Experiment", ...]
    launch: str | None
    target: float | None
    budget_bytes: float | None
    reference: Path | None

    @property
    def family(self) -> tuple["Experiment", ...]:
        """The experiments that this one needs, and itself."""
        return (*self.needs, self)

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
        """Stands for the cells, their order and what they run: a task of a job array knows its cell by number alone."""
        cells = (f"{cell.name} {cell.config.sha256} {cell.config.federation.rounds}" for cell in self.cells)
        return hashlib.sha256("\n".join(cells).encode()).hexdigest()[:DIGITS]


def load_experiment(path: Path, overrides: Sequence[str] = (), out: str | None = None) -> Experiment:
    """Read an experiment file and those that it needs, expand its grid and validate every cell.

    Args:
        overrides: `key.sub=value`, for every cell; of `prepare.`, for the experiment.
        out: instead of the file's.

    Raises:
        ConfigError: with all that is wrong in any cell.
    """
    file, moved = read_experiment(path, overrides, out)
    load_plugins(_plugins(path, file))
    axes = {name: _axis(name, given) for name, given in file.grid.items()}
    needs = []
    for name in file.needs:
        needed, exports = _load_needed(Path(os.path.normpath(path.parent / name)), overrides, out)
        needs.append(needed)
        moved |= exports
    own = [text for text in overrides if entry_of(text) is None]
    if problems := [
        *_axis_problems(file, axes),
        *_key_problems(file, axes, own),
        *_prepare_problems(file, needs, overrides),
    ]:
        raise refusal(path, problems)
    if not (cells := tuple(_cells(path, file, axes, own, moved))):
        raise refusal(path, ["exclude: leaves no cell of the grid"])
    return Experiment(
        path=path,
        options=(*(part for text in overrides for part in ("--set", text)), *(("--out", out) if out else ())),
        out=Path(file.out),
        axes=tuple(axes),
        cells=cells,
        prepare=file.prepare,
        needs=tuple(needs),
        launch=file.launch,
        target=file.target,
        budget_bytes=file.budget_bytes,
        reference=None if file.reference is None else Path(os.path.normpath(path.parent / file.reference)),
    )


def _plugins(path: Path, file: ExperimentFile) -> list[str]:
    """The modules that the file or its base names; their keys are known to the grid, too."""
    base = Path(os.path.normpath(path.parent / str(file.base)))
    found = file.settings.get("plugins") or (read_values(base).get("plugins") if base.is_file() else None)
    return [module for module in found if isinstance(module, str)] if isinstance(found, list) else []


def _load_needed(path: Path, overrides: Sequence[str], out: str | None) -> tuple[Experiment, dict[str, str]]:
    """An experiment that another needs, and where its exports are: folder by its own `out` -> folder.

    The other's overrides count for what this one's grid does not vary, and for data that this one prepares, too.
    """
    file, _ = read_experiment(path, overrides, None)
    if file.needs:
        raise ConfigError(f"{path}: needs: is itself needed by another experiment, which has to name them all")
    varied = set().union(*(_keys(_axis(name, given)) for name, given in file.grid.items()))
    passed = [
        text
        for text in overrides
        if (entry_of(text) in file.prepare if entry_of(text) is not None else not _overlaps(key_of(text), varied))
    ]
    needed = load_experiment(path, passed, out and f"{out}/{NEEDED}/{path.stem}")
    places = {f"{file.out}/{cell.name}/{EXPORT}": str(cell.export) for cell in needed.cells}
    return needed, {place(old): new for old, new in places.items()} if out else {}


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
    given = set(map(key_of, overrides))
    for key in sorted(key for key in given if _overlaps(key, varied)):
        yield f"--set {key}: the grid varies it"
    if "run_dir" in {*varied, *given, *file.settings}:
        yield "run_dir: follows from out: and the cell's values; set neither it nor an axis of that name"
    for key in (key for entry in file.exclude for key in flatten(entry) if key not in (*axes, *known_keys())):
        yield f"exclude: {key}: neither an axis nor a key{suggestion(key)}"
    for key, wanted in (pair for entry in file.exclude for pair in flatten(entry).items()):
        labels = [label for label, settings in axes.get(key, ()) if key not in settings]
        for name in (name for name in _any_of(wanted) if labels and _label(name) not in labels):
            yield f"exclude: {key}: no value has the name {name!r}; there are {', '.join(labels)}"


def _prepare_problems(file: ExperimentFile, needs: Sequence[Experiment], overrides: Sequence[str]) -> Iterator[str]:
    known = dict.fromkeys([*file.prepare, *(name for needed in needs for name in needed.prepare)])
    for text in overrides:
        if (name := entry_of(text)) is not None and name not in known:
            valid = f"there are {', '.join(known)}" if known else "there is none"
            yield f"--set {key_of(text)}: prepare: has no entry {name!r}; {valid}"
    folders = [(f"{PREPARE}{name}", entry.path) for name, entry in file.prepare.items()]
    for (one, left), (other, right) in itertools.combinations(folders, 2):
        if place(left) == place(right):
            yield f"prepare: {one} and {other} both have the path {left}"
    outs = [("this file", file.out), *((str(needed.path), str(needed.out)) for needed in needs)]
    for (one, left), (other, right) in itertools.combinations(outs, 2):
        if place(left) == place(right):
            yield f"needs: {one} and {other} both have the out {left}"


def _overlaps(key: str, varied: Iterable[str]) -> bool:
    """Whether a key is one of those that are varied, or the section of one."""
    return any(f"{leaf}.".startswith(f"{key}.") for leaf in varied)


def _keys(axis: Axis) -> set[str]:
    return {key for _, settings in axis for key in settings}


def _cells(
    path: Path, file: ExperimentFile, axes: Mapping[str, Axis], overrides: Sequence[str], moved: Mapping[str, str]
) -> Iterator[Cell]:
    """Every cell that is not excluded.

    Args:
        moved: folders of prepared data and exports as files name them -> where they are.

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
        if config and (changes := _moved(config, moved)):
            texts = (*texts, *_overrides(changes))
            config, found = check_values(resolved, texts)
        known = flatten(resolved) | (flatten(config.model_dump()) if config else {})
        if any(_matches(entry, known, values) for entry in file.exclude):
            continue
        for problem in found:
            problems.setdefault(problem, []).append(name)
        if config:
            yield Cell(name=name, values=values, config_file=base, overrides=texts, config=config)
    if problems:
        raise refusal(path, (f"{problem} ({_some(names)})" for problem, names in problems.items()))


def _moved(config: Config, moved: Mapping[str, str]) -> Settings:
    """What a cell's keys have to say of folders that are elsewhere."""
    changes: Settings = {}
    if path := moved.get(place(config.data.path)):
        changes["data.path"] = path
    sources = [moved.get(place(source), source) for source in config.tuning.folders]
    if sources != config.tuning.folders:
        changes["tuning.sources"] = sources
    return changes


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


def some_of(cells: Sequence[Cell]) -> str:
    """Some of the cells that a problem is with, by their names."""
    return _some([cell.name for cell in cells])


def _some(names: Sequence[str]) -> str:
    more = len(names) - CELLS_NAMED
    return "cell " + "; ".join(names[:CELLS_NAMED]) + (f"; and {more} more" if more > 0 else "")
