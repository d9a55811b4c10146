"""Labelled texts of a user's own: the task that they show, and a run that fits them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedhpc.commands.init.columns import field_names, label_columns, text_columns
from fedhpc.commands.init.files import (
    TWO_FILES,
    Findings,
    Source,
    basic_config,
    block,
    printed,
    spread,
    usual_devices,
    usual_length,
)
from fedhpc.config import Config
from fedhpc.data.prepared import Description
from fedhpc.data.preparing_classes import Examples, describe, read_source
from fedhpc.data.readers import Record
from fedhpc.data.recipe import Recipe, TargetModel, load_target_model
from fedhpc.data.tasks import SPLITS, Head, Task
from fedhpc.data.texts import encode
from fedhpc.data.tokens import NO_LIMIT, TextEncoder
from fedhpc.errors import DataError, UserError
from fedhpc.model.limits import most_tokens
from fedhpc.model.pretrained import read_shape

MOST_CLASSES = 1000
NUM_TOKENS = 5


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How the task is put to the model."""

    kind: str
    head: Head
    why: str
    """What speaks against class words; empty if nothing does."""
    max_length: int
    tokens: np.ndarray
    """Of each training example, before any is shortened."""


def look(
    name: str, source: Source, records: Sequence[Record], texts: Sequence[str], label: str | None, recipe: Recipe
) -> Findings:
    """What the examples are, and what goes into the files.

    Args:
        name: of the task.
        source: the user's files.
        records: the training examples.
        texts: the columns of text; found out unless given.
        label: the column of labels; found out unless given.
        recipe: what is to be prepared.

    Raises:
        UserError: something is wrong with them, or the model cannot take them.
    """
    task = make_task(name, source, records, texts, label)
    if "validation" not in source.files:
        label = task.columns["label"]
        raise DataError(
            f"--data {source.train}: texts with a label ({label}) need a file to validate on as well; {TWO_FILES}; of "
            "texts to be generated name the column: --response COLUMN"
        )
    rows = read_source(task, str(source.folder), task.splits)
    for split in rows.values():
        split.texts.check_blank(task.fields)
    fit = fit_to_model(task, rows["train"], recipe, load_target_model(recipe.model))
    config = run_config(name, recipe.model, fit.head, len(rows["train"].labels))
    numbers = np.bincount(rows["train"].labels, minlength=len(task.classes))
    counts = _counted(dict(zip(task.classes, numbers.tolist(), strict=True)))
    return Findings(
        examples=" and ".join(f"{len(rows[split].labels)} {split}" for split in SPLITS) + " examples",
        files=", ".join(source.files.values()),
        lines=found(task, rows["train"], counts, fit),
        templates=("task.yaml", "run.yaml"),
        values={"COUNTS": counts, **run_values(config), **task_values(task, list(records[0]))},
        config=config,
        options=[*(["--head", fit.head] if fit.why else []), "--max-length", str(fit.max_length)],
        after=[],
    )


def make_task(name: str, source: Source, records: Sequence[Record], texts: Sequence[str], label: str | None) -> Task:
    """The task that the training examples show.

    Raises:
        DataError: its columns do not tell what they are.
    """
    columns = list(records[0])
    label = label or _label_column(source.train, columns)
    values = _label_values(source.train, records, label)
    texts = texts or _text_columns(source.train, records, [column for column in columns if column != label])
    if label in texts:
        others = ", ".join(column for column in columns if column != label)
        raise DataError(f"--text {label}: that is the label's column; the others are {others}")
    fields = field_names(texts, ("word", "label"))
    shown = " ".join(f"{{{field}}}" for field in fields)
    return Task(
        name=name,
        columns={**dict(zip(fields, texts, strict=True)), "label": label},
        classes=class_words(values),
        encoder_template=f"{shown} It was <mask> .",
        decoder_template=f"{shown} It was {{word}} .",
        splits={split: (file,) for split, file in source.files.items()},
    )


def _label_column(file: Path, columns: Sequence[str]) -> str:
    named = label_columns(columns)
    if len(named) != 1:
        which = f"{' and '.join(named)} may both be" if named else "none is called label, so none is known to be"
        others = "" if named else "or that of texts to be generated: --response COLUMN, "
        raise DataError(f"{file}: {which} the label's column; name it: --label COLUMN, {others}of {', '.join(columns)}")
    return named[0]


def _label_values(file: Path, records: Sequence[Record], label: str) -> list[str]:
    """The labels there are, in order; what is no label is left for the reader to refuse."""
    found = [record.get(label) for record in records]
    values = {str(value) for value in found if value is not None and str(value).strip()}
    if not 2 <= len(values) <= min(MOST_CLASSES, len(found) / 2):
        raise DataError(
            f"{file}: column {label!r} has {len(values)} different values in {len(found)} examples; expected from 2 to "
            f"{MOST_CLASSES} classes that repeat. Another column: --label COLUMN, of {', '.join(records[0])}"
        )
    if any("\ud800" <= character <= "\udfff" for value in values for character in value):
        raise DataError(f"{file}: column {label!r} holds half a character")
    return sorted(values, key=lambda value: (len(value), value) if value.isdecimal() else (0, value))


def _text_columns(file: Path, records: Sequence[Record], columns: list[str]) -> list[str]:
    found = text_columns(records, columns, words=0 if len(columns) == 1 else 2)
    if not found:
        raise DataError(f"{file}: none of the columns {', '.join(columns)} holds texts; name them: --text COLUMN")
    return found


def class_words(values: Sequence[str]) -> dict[str, str]:
    """Label value -> class word: the label itself as it is said, where these differ."""
    words = [re.sub(r"[\s_-]+", " ", value).strip() for value in values]
    return dict(zip(values, words if len(set(words)) == len(words) and all(words) else values, strict=True))


def fit_to_model(task: Task, rows: Examples, recipe: Recipe, backbone: TargetModel) -> Fit:
    """Whether class words can answer, and how long the texts are.

    Raises:
        UserError: the model can be given neither head, or cannot read a text.
    """
    head: Head = "verbalizer"
    why = "" if all(re.search(r"[^\W\d_]", word) for word in task.classes.values()) else "the labels are no words"
    try:
        if not why:
            describe(recipe, task, backbone)
    except UserError as error:
        why = str(error).partition(";")[0]
    if why:
        head = "linear"
    template = task.template(kind=backbone.kind, head=head)
    encoder = TextEncoder(template, backbone.tokenizer, kind=backbone.kind, max_length=NO_LIMIT)
    encoded = encode(rows.texts.rows, rows.texts.place, encoder, backbone.vocabulary_size)
    tokens = np.array([len(example.ids) for example in encoded])
    most = longest_text(recipe, task, backbone, head)
    return Fit(kind=backbone.kind, head=head, why=why, max_length=min(usual_length(tokens), most), tokens=tokens)


def longest_text(recipe: Recipe, task: Task, backbone: TargetModel, head: Head) -> int:
    """Tokens that the model has places for, beside the prompts."""
    asked = Recipe(**{**vars(recipe), "head": head, "max_length": NO_LIMIT})
    description = Description(**describe(asked, task, backbone), splits={}, files={})
    return most_tokens(run_config(task.name, recipe.model, head, 1), description, read_shape(recipe.model))


def run_config(name: str, model: str, head: Head, num_train: int) -> Config:
    """The run, as far as it depends on the data."""
    federation = {"num_devices": usual_devices(num_train), "sample_rate": 0.2}
    return basic_config(name, model, federation=federation, tuning={"num_tokens": NUM_TOKENS, "head": head})


def run_values(config: Config) -> dict[str, str]:
    """What run.yaml says of it; values before a comment are padded to one column."""
    return {
        "DEVICES": str(config.federation.num_devices).ljust(17),
        "TOKENS": str(NUM_TOKENS).ljust(18),
        "HEAD": config.tuning.head.ljust(24),
    }


def task_values(task: Task, columns: Sequence[str]) -> dict[str, str]:
    """What task.yaml says."""
    return {
        "AVAILABLE": ", ".join(map(printed, columns)),
        "COLUMNS": block({"columns": task.columns}),
        "CLASSES": block({"classes": task.classes}),
        "TEMPLATE": block({"template": {"encoder": task.encoder_template, "decoder": task.decoder_template}}),
        "SPLITS": block({"splits": {split: files[0] for split, files in task.splits.items()}}),
    }


def found(task: Task, rows: Examples, counts: str, fit: Fit) -> list[str]:
    """What the training examples are, in lines."""
    words = np.array([sum(len(row[field].split()) for field in task.fields) for row in rows.texts.rows])
    shortened = int((fit.tokens > fit.max_length).sum())
    return [
        f"text: {', '.join(printed(task.columns[field]) for field in task.fields)}; {spread(words)} words, "
        f"{spread(fit.tokens)} tokens; {shortened} are shortened to {fit.max_length}",
        f"label: {printed(task.columns['label'])}; {counts}",
        f"model: {fit.kind}, {fit.head} head" + (f" ({fit.why})" if fit.why else ""),
    ]


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{printed(value)} {count}" for value, count in counts.items())
