"""Preparing a labelled text data set: its template applied, tokenised for one model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from fedhpc.data.prepared import Description, Split, tokenizer_fingerprint, write_prepared
from fedhpc.data.readers import Records
from fedhpc.data.recipe import Recipe, TargetModel, pad_id_of, setting
from fedhpc.data.sources import read_records
from fedhpc.data.tasks import Task, template_fields
from fedhpc.data.texts import Texts, encode, text_fields
from fedhpc.data.tokens import TextEncoder, check_known, find_word_ids
from fedhpc.errors import DataError, ModelError
from fedhpc.seeding import generator


@dataclass(frozen=True, kw_only=True)
class Examples:
    """The examples of one split, read and checked."""

    texts: Texts
    labels: list[int]


def read_source(task: Task, source: str, files: Mapping[str, Sequence[str]]) -> dict[str, Examples]:
    """Read and check both splits of a source of any form; DataError for what cannot be read.

    Args:
        files: split -> file names to look for.
    """
    found = read_records(source, files, headerless=task.headerless, labels=task.classes)
    return {split: _rows(task, records) for split, records in found.items()}


def _rows(task: Task, records: Records) -> Examples:
    rows, labels = [], []
    places = {value: place for place, value in enumerate(task.classes)}
    columns: dict[str, str] = {}
    try:
        for record in records.each:
            columns = columns or {name: _resolve(task, name, list(record)) for name in task.columns}
            column = columns["label"]
            labels.append(places[_label(task, record.get(column), column, records.class_names.get(column, ()))])
            rows.append(text_fields(record, {name: columns[name] for name in task.fields}))
    except ValueError as error:
        raise DataError(f"{records.place(len(rows))}: {error}") from error
    if not rows:
        raise DataError(f"{records.source} holds no examples")
    return Examples(texts=Texts(unit=records.unit, numbers=records.numbers, rows=rows), labels=labels)


def _resolve(task: Task, field: str, available: list[str]) -> str:
    for name in task.column_names(field):
        if name in available:
            return name
    wanted = task.columns[field]
    raise ValueError(f"no column {wanted!r}, which task {task.name} needs; there are {', '.join(available)}")


def _label(task: Task, value: Any, column: str, names: Sequence[str]) -> str:
    """A label as the task writes it; numbered classes that have names count by these. ValueError for any other."""
    if not isinstance(value, str | int | float | None):
        raise ValueError(f"column {column!r} holds a {type(value).__name__}, expected a label")
    name = "" if value is None else str(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(names):
        # The author of a task file that knows none of the names has written numbers.
        by_number = not task.is_built_in and not any(task.label(other) or other.isdigit() for other in names)
        name = name if by_number else names[value]
    label = task.label(name)
    if label is None:
        problem = f"unknown label {name!r}" if name else f"no label in column {column!r}"
        valid = ", ".join(task.classes) + (f"; or by name {', '.join(task.class_names)}" if task.class_names else "")
        raise ValueError(f"{problem}; valid are {valid}")
    return label


def limit(given: Examples, count: int | None, seed: int) -> Examples:
    """A random choice of so many examples, in their order in the source."""
    if count is None or count >= len(given.labels):
        return given
    chosen = np.sort(generator(seed, purpose="limit-train").choice(len(given.labels), count, replace=False))
    numbers, rows = ([part[index] for index in chosen] for part in (given.texts.numbers, given.texts.rows))
    labels = [given.labels[index] for index in chosen]
    return Examples(texts=Texts(unit=given.texts.unit, numbers=numbers, rows=rows), labels=labels)


def tokenise(given: Examples, encoder: TextEncoder, vocabulary_size: int, pad_id: int, title: str) -> tuple[Split, int]:
    """Tokenise one split; also tells how many examples were shortened."""
    encoded: list[tuple[np.ndarray, int]] = []
    num_shortened = 0
    examples = encode(given.texts.rows, given.texts.place, encoder, vocabulary_size)
    for example in tqdm(examples, total=len(given.labels), desc=title, unit=" ex", disable=None):
        ids = np.array(example.ids, np.int32)  # the list is ten times as large
        encoded.append((ids, example.slot))
        num_shortened += example.truncated
    return Split.of(encoded, given.labels, pad_id=pad_id), num_shortened


def prepare_classes(recipe: Recipe, task: Task, model: TargetModel) -> str:
    """Do all of it; returns the closing summary."""
    facts = describe(recipe, task, model)
    template, tokenizer = facts["template"], model.tokenizer
    source = read_source(task, recipe.source, recipe.files(task))
    for given in source.values():
        given.texts.check_blank(template_fields(template))
    source["train"] = limit(source["train"], recipe.limit_train, recipe.seed)

    encoder = TextEncoder(template, tokenizer, kind=model.kind, max_length=recipe.max_length)
    size, pad_id = model.vocabulary_size, facts["pad_id"]
    encoded = {name: tokenise(given, encoder, size, pad_id, name) for name, given in source.items()}
    description = write_prepared(recipe.out, facts, {name: split for name, (split, _) in encoded.items()})
    return summary(description, encoded, recipe.out)


def describe(recipe: Recipe, task: Task, model: TargetModel) -> dict[str, Any]:
    """What the prepared data's description says that does not follow from the source.

    Raises:
        UserError: the task cannot be put to this model.
    """
    head = recipe.head or "verbalizer"
    template = task.template(kind=model.kind, head=head)
    word_ids: list[list[int]] = [[] for _ in task.classes]
    if head == "verbalizer":
        if not model.can_score_words:
            raise ModelError(f"model {recipe.model!r} has no language-model head to score words; use --head linear")
        word_ids = find_word_ids(list(task.classes.values()), template, model.tokenizer, kind=model.kind)
        for word, ids in zip(task.classes.values(), word_ids, strict=True):
            check_known(f"class word {word!r}", ids, model.tokenizer, model.vocabulary_size)
    return {
        "task": task.name,
        "head": head,
        "kind": model.kind,
        "model": recipe.model,
        "tokenizer_sha256": tokenizer_fingerprint(model.tokenizer),
        "pad_id": pad_id_of(model),
        "max_length": recipe.max_length,
        "template": template,
        "class_names": list(task.classes),
        "class_words": list(task.classes.values()),
        "word_ids": word_ids,
        "metric": task.metric,
        "selected": recipe.selected,
    }


def summary(description: Description, encoded: Mapping[str, tuple[Split, int]], out: str) -> str:
    """What was made, where it is, and what to do next."""
    header = ["split", "examples", *description.class_names, "median", "longest", "shortened"]
    table = [header]
    for name, (split, num_shortened) in encoded.items():
        facts = description.splits[name]
        numbers = [facts["examples"], *facts["class_counts"], int(np.median(split.lengths)), facts["longest"]]
        table.append([name, *map(str, numbers), str(num_shortened)])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in table]
    named, placed = setting("data.task", description.task), setting("data.path", out)
    words = zip(description.class_names, description.class_words, description.word_ids, strict=True)
    answers = ", ".join(f"{name} = {word!r} {ids}" for name, word, ids in words)
    return "\n".join(
        [
            f"{description.task} for {description.kind} {description.model}, {description.head} head",
            *lines,
            f"template: {description.template}",
            *([f"answers: {answers}"] if description.head == "verbalizer" else []),
            f"written to {out}; next:",
            f"  fedhpc run CONFIG.yaml --set {named} --set {placed}",
        ]
    )
