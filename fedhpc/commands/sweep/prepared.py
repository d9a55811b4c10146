"""The prepared data of an experiment: what its cells need, whether it is there, and whether it was made as asked."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedhpc.checkpoint.identity import brief, differences
from fedhpc.commands.sweep.experiment import Cell, Experiment, some_of
from fedhpc.commands.sweep.experiment_file import PREPARE, Preparation, place, refusal
from fedhpc.commands.sweep.standing import waiting
from fedhpc.data.generation import GenerationTask
from fedhpc.data.prepared import Description, PreparedData, check_writable
from fedhpc.data.preparing import description_of, prepare
from fedhpc.data.recipe import Recipe, TargetModel, load_target_model
from fedhpc.data.sources import find_source
from fedhpc.data.task_files import load_task
from fedhpc.errors import ConfigError, UserError, users_fault
from fedhpc.files import held

COMPARED = (
    *("task", "head", "kind", "max_length", "template"),
    *("class_names", "class_words", "word_ids", "metric"),
)
"""What a description says of how the data were made, but for the tokenizer and the choice of examples."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """An entry of `prepare:` that cells need."""

    key: str
    recipe: Recipe

    @property
    def is_there(self) -> bool:
        """Whether its folder holds prepared data."""
        return _are_there(self.recipe.out)


def find_parts(experiment: Experiment, sources: str | None) -> list[Part]:
    """What the cells that are not done need prepared, those of needed experiments first.

    Args:
        sources: a folder that has each source under its task's name, instead of the entries' own.

    Raises:
        ConfigError: with all that is wrong with the entries, their sources, and what is there already.
    """
    problems: list[str] = []
    parts: dict[str, Part] = {}
    for one in experiment.family if waiting(experiment) else ():
        for part in _parts_of(one, sources, problems):
            first = parts.setdefault(place(part.recipe.out), part)
            theirs, ours = asdict(first.recipe), asdict(part.recipe)
            problems += [
                f"{part.key}.{key}: {ours[key]} in {one.path}, but {theirs[key]} for the same folder elsewhere"
                for key in ours
                if key != "out" and theirs[key] != ours[key]
            ]
    models: dict[str, TargetModel] = {}
    for model in dict.fromkeys(part.recipe.model for part in parts.values()):
        try:
            models[model] = load_target_model(model)
        except UserError as error:
            problems.append(str(error))
    for part in parts.values():
        for check in (_check_source, check_made):
            try:
                check(part, models.get(part.recipe.model))
            except (UserError, OSError) as error:
                problems.append(f"{part.key}: {_said_of(error)}")
    if problems:
        raise refusal(experiment.path, problems)
    return list(parts.values())


def _said_of(error: UserError | OSError) -> str:
    """What is wrong; raises again what is the machine's fault."""
    if (problem := users_fault(error)) is None:
        raise error
    return problem


def _are_there(path: str) -> bool:
    return (Path(path) / "description.json").is_file()


def _parts_of(experiment: Experiment, sources: str | None, problems: list[str]) -> Iterator[Part]:
    """Those that one experiment's cells need; what is wrong goes to the problems."""
    users: dict[str, list[Cell]] = {}
    for cell in waiting(experiment):
        users.setdefault(place(cell.config.data.path), []).append(cell)
    entries = {place(entry.path): (name, entry) for name, entry in experiment.prepare.items()}
    for path, cells in users.items():
        if path in entries:
            name, entry = entries[path]
            try:
                yield Part(key=f"{PREPARE}{name}", recipe=_recipe(name, entry, cells, sources))
            except (UserError, OSError) as error:
                problems.append(f"{PREPARE}{name}: {_said_of(error)}")
        elif not _are_there(path):
            folder, whose = cells[0].config.data.path, some_of(cells)
            problems.append(
                f"data.path: {folder}: no prepared data are there, and no entry of prepare: makes them ({whose})"
            )


def _recipe(name: str, entry: Preparation, cells: Sequence[Cell], sources: str | None) -> Recipe:
    """What an entry asks for.

    Raises:
        UserError: its cells want something else.
    """
    task = load_task(entry.task or name)
    model = entry.model or _common("model", "model.name", [cell.config.model.name for cell in cells])
    if isinstance(task, GenerationTask):
        head, needed = entry.head, "language_model"
    else:
        head = needed = entry.head or _common("head", "tuning.head", [cell.config.tuning.head for cell in cells])
    for cell in cells:
        for key, wanted, made in (
            ("data.task", cell.config.data.task, task.name),
            ("data.max_length", cell.config.data.max_length, entry.max_length),
            ("tuning.head", cell.config.tuning.head, needed),
        ):
            if wanted not in (None, made):
                raise ConfigError(f"makes data with {made}, but its cells have {key}: {wanted} (as {cell.name})")
    return Recipe(
        task=entry.task or name,
        source=entry.source if sources is None else os.path.abspath(Path(sources, task.name).expanduser()),
        model=model,
        out=entry.path,
        head=head,
        overlong=entry.overlong,
        max_length=entry.max_length,
        limit_train=entry.limit_train,
        seed=entry.seed,
        validation=entry.validation,
    )


def _common(option: str, key: str, values: Sequence[Any]) -> Any:
    if len(different := dict.fromkeys(values)) > 1:
        raise ConfigError(f"its cells have different {key}: {', '.join(different)}; give {option}:, or each a path")
    return values[0]


def _check_source(part: Part, _: TargetModel | None) -> None:
    """UserError if a part that is not there cannot be made of its source, or not where it is to be."""
    recipe = part.recipe
    if not part.is_there:
        check_writable(recipe.out)
        find_source(recipe.source, recipe.files(load_task(recipe.task)))


def make(part: Part) -> None:
    """Prepare a part that was not there; one at a time in a folder, since sweeps may share it.

    Raises:
        UserError: it cannot be made, or somebody has made it otherwise meanwhile.
    """
    folder = Path(part.recipe.out).parent
    folder.mkdir(parents=True, exist_ok=True)
    with held(folder):
        if part.is_there:
            check_made(part, load_target_model(part.recipe.model))
        else:
            prepare(part.recipe)


def check_made(part: Part, model: TargetModel | None) -> None:
    """UserError if the task does not suit the model, or what is there was made otherwise."""
    if model is None:
        return
    recipe = part.recipe
    wanted = description_of(recipe, load_task(recipe.task), model)
    if not part.is_there:
        return
    if differing := _differences(PreparedData.open(recipe.out, verify=False).description, wanted):
        raise ConfigError(
            f"{recipe.out} was made otherwise: {'; '.join(differing)}; remove it to have it made anew, or give another "
            f"folder: --set {part.key}.path=FOLDER"
        )


def _differences(found: Description, wanted: dict[str, Any]) -> list[str]:
    """How prepared data differ from those that an entry asks for; an older description says less."""
    generation = wanted.get("generation", {})
    keys = [*(key for key in COMPARED if key in wanted), *generation]
    theirs, ours = (
        {key: brief(side.get(key)) for key in keys} for side in (asdict(found) | found.generation, wanted | generation)
    )
    if found.tokenizer_sha256 != wanted["tokenizer_sha256"]:
        theirs["tokenizer"], ours["tokenizer"] = (f"that of {model}" for model in (found.model, wanted["model"]))
    asked = wanted["selected"]
    if found.selected:
        theirs, ours = theirs | found.selected, ours | asked
    elif asked["limit_train"] is not None and found.splits["train"]["examples"] > asked["limit_train"]:
        theirs["limit_train"], ours["limit_train"] = found.splits["train"]["examples"], asked["limit_train"]
    return differences(theirs, ours, "there")
