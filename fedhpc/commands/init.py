"""`fedhpc init`: a task, a run and a SLURM job for a user's own data, after a look at them."""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedhpc.config import Config
from fedhpc.data.generation import COLUMNS
from fedhpc.data.prepared import Description
from fedhpc.data.preparing_classes import Examples, describe, read_source
from fedhpc.data.readers import Record, read_table
from fedhpc.data.recipe import Recipe, TargetModel, load_target_model
from fedhpc.data.sources import find_source
from fedhpc.data.tasks import GENERATION_TASKS, SPLITS, TASKS, Head, Task
from fedhpc.data.texts import encode
from fedhpc.data.tokens import TextEncoder
from fedhpc.errors import ConfigError, DataError, UserError
from fedhpc.job.job_files import COMMAND, TEMPLATES
from fedhpc.model.limits import most_tokens
from fedhpc.model.pretrained import read_shape
from fedhpc.yaml_files import write

GENERATED = [own for form, own in COLUMNS.items() if form != "text"]
"""Columns of texts to be generated."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
LABELS = ("label", "labels", "class", "category", "target")
"""Columns that are taken for the label's, in any case."""
MOST_CLASSES = 1000
DEVICES, EXAMPLES_EACH = 20, 10
"""So many devices, but none with fewer examples on average."""
NUM_TOKENS = 5
LENGTH_STEP = 16
"""Tokens; the longest text is rounded up to a multiple."""
LONG = 128
"""Tokens of a text that is shortened if it is among the longest hundredth."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A user's files: one for training, one for validation."""

    folder: Path
    files: Mapping[str, str]
    """Split -> name in the folder."""

    @property
    def train(self) -> Path:
        """The training examples' file."""
        return self.folder / self.files["train"]


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


def init(name: str, data: Sequence[str], model: str, texts: Sequence[str], label: str | None) -> str:
    """Look at the data, write NAME.task.yaml, NAME.yaml and NAME.slurm here; what was found, and what to do next.

    Args:
        name: of the task, and so of the files.
        data: a folder, or the files of the training and the validation examples.
        model: folder or hub name of the backbone.
        texts: the columns of text; found out unless given.
        label: the column of labels; found out unless given.

    Raises:
        UserError: a file is there already, or something is wrong with what was given.
    """
    targets = new_files(name)
    source = find_files(data)
    records = read_records(source.train)
    task = make_task(name, source, records, texts, label)
    rows = read_source(task, str(source.folder), task.splits)
    for split in rows.values():
        split.texts.check_blank(task.fields)
    recipe = Recipe(task=str(targets[0]), source=str(source.folder), model=model, out=f"prepared/{name}")
    fit = fit_to_model(task, rows["train"], recipe, load_target_model(model))
    config = run_config(name, model, fit.head, len(rows["train"].labels))
    ranks = 1 + config.federation.devices_per_round
    numbers = np.bincount(rows["train"].labels, minlength=len(task.classes))
    counts = _counted(dict(zip(task.classes, numbers.tolist(), strict=True)))
    examples = " and ".join(f"{len(rows[split].labels)} {split}" for split in SPLITS) + " examples"
    values = {
        "NAME": name,
        "EXAMPLES": examples,
        "COUNTS": counts,
        "CONFIG": str(targets[1]),
        "RANKS": str(ranks),
        "COMMAND": COMMAND,
        "TEMPLATES": str(TEMPLATES),
        **run_values(config),
        **task_values(task, list(records[0])),
    }
    for target, template in zip(targets, ("task.yaml", "run.yaml", "run.slurm"), strict=True):
        with target.open("x", encoding="utf-8") as file:
            file.write(filled(template, values))
    prepare = ["fedhpc", "prepare", "--task", recipe.task, "--source", recipe.source, "--model", recipe.model]
    prepare += [*(["--head", fit.head] if fit.why else []), "--max-length", str(fit.max_length), "--out", recipe.out]
    return "\n".join(
        [
            f"{name}: {examples} in {source.folder} ({', '.join(source.files.values())})",
            *found(task, rows["train"], counts, fit),
            f"wrote {', '.join(map(str, targets))}; read them, then:",
            f"  {shlex.join(prepare)}",
            f"  mpirun -np {ranks} fedhpc run {targets[1]}",
        ]
    )


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
    """The files of both splits.

    Raises:
        DataError: there are none, or they are in two folders.
    """
    two = "give a folder with train.tsv and dev.tsv (or .csv, .jsonl, .parquet), or two such files of one folder"
    paths = [Path(name).expanduser() for name in data]
    for path in paths:
        if not path.exists():
            raise DataError(f"--data {path}: there is no such file or folder; {two}")
    if len(paths) == 1 and paths[0].is_dir():
        found = find_source(str(paths[0]), SPLITS)
        if found is None:
            raise DataError(f"--data {paths[0]}: a folder of datasets.save_to_disk; {two}")
        return Source(folder=paths[0], files={split: file.name for split, file in found.items()})
    if len(paths) != 2 or not all(path.is_file() for path in paths) or paths[0].parent != paths[1].parent:
        raise DataError(f"--data {' '.join(map(str, paths))}: {two}")
    return Source(folder=paths[0].parent, files=dict(zip(SPLITS, (path.name for path in paths), strict=True)))


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


def make_task(name: str, source: Source, records: Sequence[Record], texts: Sequence[str], label: str | None) -> Task:
    """The task that the training examples show.

    Raises:
        DataError: its columns are not those that were named, or do not tell what they are.
    """
    columns = list(records[0])
    for option, column in [("--label", label), *(("--text", text) for text in texts)]:
        if column is not None and column not in columns:
            raise DataError(f"{option} {column}: {source.train} has no such column; there are {', '.join(columns)}")
    label = label or _label_column(source.train, columns)
    values = _label_values(source.train, records, label)
    texts = texts or _text_columns(source.train, records, [column for column in columns if column != label])
    if label in texts:
        others = ", ".join(column for column in columns if column != label)
        raise DataError(f"--text {label}: that is the label's column; the others are {others}")
    are_names = all(re.fullmatch(r"\w+", column) and column not in ("word", "label") for column in texts)
    fields = texts if are_names else [f"text{number}" for number in range(1, 1 + len(texts))]
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
    named = [column for column in columns if column.lower() in LABELS]
    if len(named) != 1:
        if not named and any(set(own.values()) - {"input"} <= set(columns) for own in GENERATED):
            raise DataError(
                f"{file}: {', '.join(columns)} look like texts to be generated, for which init writes nothing: write a "
                "task file of kind: generation, or name the label's column: --label COLUMN"
            )
        which = f"{' and '.join(named)} may both be" if named else "none is called label, so none is known to be"
        raise DataError(f"{file}: {which} the label's column; name it: --label COLUMN, of {', '.join(columns)}")
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
    """Those with two words or more on average; a column that is alone may have fewer."""
    words = {column: [record.get(column) for record in records] for column in columns}
    found = [
        column
        for column, cells in words.items()
        if all(isinstance(cell, str) for cell in cells)
        and (len(columns) == 1 or sum(len(str(cell).split()) for cell in cells) >= 2 * len(cells))
    ]
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
    encoder = TextEncoder(template, backbone.tokenizer, kind=backbone.kind, max_length=1 << 30)
    encoded = encode(rows.texts.rows, rows.texts.place, encoder, backbone.vocabulary_size)
    tokens = np.array([len(example.ids) for example in encoded])
    longest = max(int(np.percentile(tokens, 99)), min(int(tokens.max()), LONG))
    wanted = LENGTH_STEP * -(-longest // LENGTH_STEP)
    most = longest_text(recipe, task, backbone, head)
    return Fit(kind=backbone.kind, head=head, why=why, max_length=min(wanted, most), tokens=tokens)


def longest_text(recipe: Recipe, task: Task, backbone: TargetModel, head: Head) -> int:
    """Tokens that the model has places for, beside the prompts."""
    asked = Recipe(**{**vars(recipe), "head": head, "max_length": 1 << 30})
    description = Description(**describe(asked, task, backbone), splits={}, files={})
    return most_tokens(run_config(task.name, recipe.model, head, 1), description, read_shape(recipe.model))


def run_config(name: str, model: str, head: Head, num_train: int) -> Config:
    """The run, as far as it depends on the data."""
    return Config.model_validate(
        {
            "run_dir": f"runs/{name}",
            "model": {"name": model},
            "data": {"path": f"prepared/{name}", "task": name},
            "federation": {"num_devices": max(1, min(DEVICES, num_train // EXAMPLES_EACH)), "sample_rate": 0.2},
            "tuning": {"num_tokens": NUM_TOKENS, "head": head},
        }
    )


def run_values(config: Config) -> dict[str, str]:
    """What run.yaml says of it; values before a comment are padded to one column."""
    return {
        "RUN_DIR": _block({"run_dir": config.run_dir}),
        "MODEL": _block({"model": {"name": config.model.name}}),
        "DATA": _block({"data": {"path": config.data.path, "task": config.data.task}}),
        "DEVICES": str(config.federation.num_devices).ljust(17),
        "TOKENS": str(NUM_TOKENS).ljust(18),
        "HEAD": config.tuning.head.ljust(24),
    }


def task_values(task: Task, columns: Sequence[str]) -> dict[str, str]:
    """What task.yaml says."""
    return {
        "TASK": _block({"task": task.name}),
        "AVAILABLE": ", ".join(map(_printed, columns)),
        "COLUMNS": _block({"columns": task.columns}),
        "CLASSES": _block({"classes": task.classes}),
        "TEMPLATE": _block({"template": {"encoder": task.encoder_template, "decoder": task.decoder_template}}),
        "SPLITS": _block({"splits": {split: files[0] for split, files in task.splits.items()}}),
    }


def filled(template: str, values: Mapping[str, str]) -> str:
    """A template's text, with a value for each @NAME@."""
    text = (TEMPLATES / template).read_text(encoding="utf-8")
    return re.sub("@([A-Z_]+)@", lambda match: values[match[1]], text)


def found(task: Task, rows: Examples, counts: str, fit: Fit) -> list[str]:
    """What the training examples are, in lines."""
    words = np.array([sum(len(row[field].split()) for field in task.fields) for row in rows.texts.rows])
    shortened = int((fit.tokens > fit.max_length).sum())
    return [
        f"text: {', '.join(_printed(task.columns[field]) for field in task.fields)}; {_spread(words)} words, "
        f"{_spread(fit.tokens)} tokens; {shortened} are shortened to {fit.max_length}",
        f"label: {_printed(task.columns['label'])}; {counts}",
        f"model: {fit.kind}, {fit.head} head" + (f" ({fit.why})" if fit.why else ""),
    ]


def _spread(numbers: np.ndarray) -> str:
    return f"{int(np.median(numbers))} (longest {numbers.max()})"


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{_printed(value)} {count}" for value, count in counts.items())


def _printed(text: str) -> str:
    """A name within a line."""
    return text if text.isprintable() else ascii(text)


def _block(values: dict[str, Any]) -> str:
    return write(values).rstrip("\n")
