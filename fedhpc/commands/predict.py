"""`fedhpc predict`: class and probability for new text, or an answer."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedhpc.commands.answering import Answerer, Asked, Asker, answer_records, answer_text, backbone_of
from fedhpc.commands.trained import Trained, load_trained
from fedhpc.data.prepared import Description, Split
from fedhpc.data.readers import TABLES, Record, Records, read_lines, read_table
from fedhpc.data.tasks import TASKS, Task, template_fields
from fedhpc.data.texts import Row, Texts, encode, text_fields
from fedhpc.errors import ConfigError, DataError
from fedhpc.evaluate.predictions import class_scores, evaluation_batches
from fedhpc.tuning.base import as_parameters

USUAL_COLUMNS = ("text", "sentence")
"""Where a task of one text may have it, if not in a column of the field's name."""


def predict_text(
    run_dir: str,
    *,
    texts: Sequence[Sequence[str]] = (),
    file: str | None = None,
    device: int | None = None,
    all_classes: bool = False,
    options: Mapping[str, Any] | None = None,
    streamed: bool = False,
) -> str:
    """A line for each text, a JSON object: `text`, `label`, `probability`; see `fedhpc.commands.answering` for others.

    Args:
        texts: each a text for every field of the task's template.
        file: or a file of them: of a form of `fedhpc.data.readers`, or with one text a line.
        device: whose personal parameters to use; None: the global ones.
        all_classes: also `probabilities`, by label.
        options: of runs that generate text: `max_new_tokens`, `temperature`, `top_p`, where they are not the run's.
        streamed: whether answers are printed as they come, and not returned.

    Raises:
        UserError: the run, a text or the file cannot be used.
    """
    trained, options = load_trained(run_dir, device), options or {}
    description = trained.job.data.description
    if _generates(trained, options):
        if all_classes:
            raise ConfigError("--all-classes: this run generates text, and has no classes")
        return answer_text(trained, texts=texts, file=file, options=options, streamed=streamed)
    fields = template_fields(description.template)
    given = _given(texts, fields) if file is None else _read(Path(file), description, fields)
    if not given.rows:
        raise DataError(f"{file}: holds no text")
    given.check_blank(fields)
    probabilities = class_probabilities(trained, given.rows, given.place)
    records = (_record(*pair, description, all_classes) for pair in zip(given.rows, probabilities, strict=True))
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def _generates(trained: Trained, options: Mapping[str, Any]) -> bool:
    """Whether a run generates text; ConfigError for options of those that do, where it does not."""
    generates = trained.job.data.description.head == "language_model"
    if options and not generates:
        raise ConfigError(f"{', '.join(options)}: this run classifies, and generates no text; leave it out")
    return generates


def predict_records(
    run_dir: str,
    texts: Sequence[str | Mapping[str, Any] | Sequence[Any]],
    *,
    device: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """The same for texts in memory, as dictionaries with the probability of every class.

    Args:
        run_dir: the run's folder.
        texts: a text each; for a task of several fields a sequence in their order, or a mapping by name; a
            conversation is a sequence of messages.
        device: whose personal parameters to use; None: the global ones.
        options: see `predict_text`.

    Raises:
        UserError: the run or a text cannot be used.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    for text in texts:
        if not isinstance(text, str | Mapping | Sequence):
            raise DataError(f"predict takes texts, not {type(text).__name__}")
    trained = load_trained(run_dir, device)
    if _generates(trained, options or {}):
        answerer = Answerer(trained, options or {})
        return answer_records(answerer, list(_asked(texts, answerer.asker)))
    description = trained.job.data.description
    fields = template_fields(description.template)
    each = [[text] if isinstance(text, str) else _in_order(text, fields) for text in texts]
    given = _given(each, fields)
    given.check_blank(fields)
    if not given.rows:
        return []
    probabilities = class_probabilities(trained, given.rows, given.place)
    return [_record(*pair, description, True) for pair in zip(given.rows, probabilities, strict=True)]


def _asked(texts: Sequence[str | Mapping[str, Any] | Sequence[Any]], asker: Asker) -> Iterator[Asked]:
    for number, text in enumerate(texts, 1):
        place = f"text {number}"
        if not isinstance(text, str | Mapping) and text and isinstance(text[0], Mapping):
            yield asker.conversation(list(text), place)
        else:
            needed = [field for field in asker.fields if field not in asker.optional or field in text]
            yield asker.text([text] if isinstance(text, str) else _in_order(text, needed), place)


def _in_order(text: Mapping[str, str] | Sequence[str], fields: Sequence[str]) -> Sequence[str]:
    if not isinstance(text, Mapping):
        return text
    if text.keys() != set(fields):
        raise DataError(f"a text has the fields {', '.join(text)}; this task takes {', '.join(fields)}")
    return [text[field] for field in fields]


def class_probabilities(
    trained: Trained, rows: Sequence[Row], place: Callable[[int], str] = "text {}".format
) -> NDArray[np.float32]:
    """Probabilities [n, C] of texts that are put and cut as the prepared data were.

    Args:
        place: says by its index where a text comes from, if it has to be refused.
    """
    job, description = trained.job, trained.job.data.description
    examples = encode(rows, place, trained.text_encoder(), job.shape.vocabulary_size)
    encoded = [(example.ids, example.slot) for example in examples]
    split = Split.of(encoded, [0] * len(rows), pad_id=description.pad_id)
    backbone = backbone_of(job)
    batches = evaluation_batches(split, np.arange(len(rows)), job.config.evaluate.batch_size)
    found = np.empty((len(rows), len(description.class_names)), np.float32)
    params = as_parameters(trained.tensors, backbone.torch_device)
    for indices, scores in class_scores(backbone, job.tuning, split, ([(params, batch)] for batch in batches)):
        found[indices] = scores.softmax(1).cpu().numpy()
    return found


def _record(
    row: Row, probabilities: NDArray[np.float32], description: Description, all_classes: bool
) -> dict[str, Any]:
    best, names = int(probabilities.argmax()), description.class_names
    (text, *more) = row.values()
    record = {"text": dict(row) if more else text, "label": names[best], "probability": float(probabilities[best])}
    if all_classes:
        record["probabilities"] = dict(zip(names, probabilities.tolist(), strict=True))
    return record


def _given(texts: Sequence[Sequence[str]], fields: Sequence[str]) -> Texts:
    rows = []
    for number, values in enumerate(texts, 1):
        if len(values) != len(fields):
            raise DataError(
                f"--text {number}: {len(values)} texts given, this task takes {len(fields)}: {', '.join(fields)}; "
                "write --text " + " ".join(field.upper() for field in fields)
            )
        rows.append(dict(zip(fields, values, strict=True)))
    return _texts(Records("--text", range(1, 1 + len(rows)), rows), {field: [field] for field in fields})


def _read(file: Path, description: Description, fields: Sequence[str]) -> Texts:
    if file.suffix.lower() in TABLES:
        task = _built_in(description)
        columns = {field: _column_names(field, fields, task) for field in fields}
        table = read_table(file, headerless=task.headerless, labels=task.classes) if task else read_table(file)
        return _texts(table, columns)
    lines = read_lines(file)
    if len(fields) > 1:
        raise DataError(f"{file}: this task takes {', '.join(fields)}; give a file {' or '.join(TABLES)} of them")
    records = ({fields[0]: line} for line in lines)
    return _texts(Records(f"{file} line", range(1, 1 + len(lines)), records), {fields[0]: fields})


def _texts(records: Records, names: Mapping[str, Sequence[str]]) -> Texts:
    """The texts of records, each field's in the first of the columns that may have it."""
    rows: list[Row] = []
    columns: dict[str, str] = {}
    try:
        for record in records.each:
            columns = columns or {field: _column(names[field], record) for field in names}
            rows.append(text_fields(record, columns))
    except ValueError as error:
        raise DataError(f"{records.place(len(rows))}: {error}") from None
    return Texts(unit=records.unit, numbers=records.numbers, rows=rows)


def _built_in(description: Description) -> Task | None:
    """The task that the data were prepared for, if it is one of those that come with fedhpc."""
    task = TASKS.get(description.task)
    return task if task and list(task.classes) == description.class_names else None


def _column_names(field: str, fields: Sequence[str], task: Task | None) -> list[str]:
    """The columns in which a field's text may be."""
    names = [field, *(task.column_names(field) if task and field in task.columns else ())]
    return names + [name for name in USUAL_COLUMNS if len(fields) == 1 and name not in names]


def _column(names: Sequence[str], record: Record) -> str:
    found = next((name for name in names if name in record), None)
    if found is None:
        wanted, available = " or ".join(map(repr, names)), ", ".join(record)
        raise ValueError(f"no column {wanted}, where this task has its text; there are {available}")
    return found
