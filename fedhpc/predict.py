"""`fedhpc predict`: class and probability for new text."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedhpc.data import Description, Split
from fedhpc.errors import DataError
from fedhpc.evaluate import class_scores, evaluation_batches
from fedhpc.job import choose_torch_device
from fedhpc.jobenv import JobEnvironment
from fedhpc.models import Backbone
from fedhpc.tables import JSON_LINES, Record, read_lines, read_table
from fedhpc.tasks import TASKS, template_fields
from fedhpc.trained import Trained, load_trained

TABLES = (".tsv", *JSON_LINES)
OTHER_TABLES = (".csv", ".parquet", ".xlsx", ".xls")
USUAL_COLUMNS = ("text", "sentence")
"""Where a task of one text may have it, if not in a column of the field's name."""

Row = Mapping[str, str]
"""Template field -> text."""


def predict_text(
    run_dir: str,
    *,
    texts: Sequence[Sequence[str]] = (),
    file: str | None = None,
    device: int | None = None,
    all_classes: bool = False,
) -> str:
    """A line for each text, a JSON object: `text`, `label`, `probability`.

    Args:
        texts: each a text for every field of the task's template.
        file: or a file of them: TSV with a header line, JSON lines, or one text a line.
        device: whose personal parameters to use; None: the global ones.
        all_classes: also `probabilities`, by label.

    Raises:
        UserError: the run, a text or the file cannot be used.
    """
    trained = load_trained(run_dir, device)
    description = trained.job.data.description
    fields = template_fields(description.template)
    rows = list(_checked(_given(texts, fields) if file is None else _read(Path(file), description, fields)))
    if not rows:
        raise DataError(f"{file}: holds no text")
    probabilities = class_probabilities(trained, rows)
    records = (_record(*pair, description, all_classes) for pair in zip(rows, probabilities, strict=True))
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def class_probabilities(trained: Trained, rows: Sequence[Row]) -> NDArray[np.float32]:
    """Probabilities [n, C] of texts that are put and cut as the prepared data were."""
    job, description = trained.job, trained.job.data.description
    encoded = [(example.ids, example.slot) for example in trained.text_encoder()(rows)]
    split = Split.of(encoded, [0] * len(rows), pad_id=description.pad_id)
    backbone = Backbone(job.config.model, job.config.tuning, description, choose_torch_device(0, JobEnvironment()))
    if job.tuning.packable:  # the others put weights in place of the model's own, which no model overlooks
        job.tuning.check(backbone)
    batches = evaluation_batches(split, np.arange(len(rows)), job.config.evaluate.batch_size)
    found = np.empty((len(rows), len(description.class_names)), np.float32)
    for examples, scores in class_scores(backbone, job.tuning, trained.tensors, split, batches):
        found[examples] = scores.softmax(1).cpu().numpy()
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


def _given(texts: Sequence[Sequence[str]], fields: Sequence[str]) -> Iterator[tuple[str, Row]]:
    for number, values in enumerate(texts, 1):
        where = f"--text {number}"
        if len(values) != len(fields):
            raise DataError(
                f"{where}: {len(values)} texts given, this task takes {len(fields)}: {', '.join(fields)}; write --text "
                + " ".join(field.upper() for field in fields)
            )
        yield where, dict(zip(fields, values, strict=True))


def _read(file: Path, description: Description, fields: Sequence[str]) -> Iterator[tuple[str, Row]]:
    suffix = file.suffix.lower()
    if suffix in OTHER_TABLES:
        raise DataError(f"{file}: {suffix} is not read; give TSV with a header line, or JSON lines")
    if suffix not in TABLES:
        if len(fields) > 1:
            raise DataError(f"{file}: this task takes {', '.join(fields)}; give a file {' or '.join(TABLES)} of them")
        yield from ((f"{file} line {number}", {fields[0]: line}) for number, line in enumerate(read_lines(file), 1))
        return
    records, number = read_table(file)
    columns: dict[str, str] = {}
    try:
        for record in records:
            columns = columns or {field: _column(field, fields, description.task, list(record)) for field in fields}
            yield f"{file} line {number}", {field: _text(record, column) for field, column in columns.items()}
            number += 1
    except ValueError as error:
        raise DataError(f"{file} line {number}: {error}") from None


def _text(record: Record, column: str) -> str:
    value = record.get(column)
    if not isinstance(value, str):
        raise ValueError(f"column {column!r} holds {value!r}, expected text")
    return value


def _column(field: str, fields: Sequence[str], task: str, available: Sequence[str]) -> str:
    names = [field, *(TASKS[task].column_names(field) if task in TASKS and field in TASKS[task].columns else ())]
    names += USUAL_COLUMNS if len(fields) == 1 else ()
    found = next((name for name in names if name in available), None)
    if found is None:
        wanted = " or ".join(map(repr, dict.fromkeys(names)))
        raise ValueError(f"no column {wanted}, where this task has its text; there are {', '.join(available)}")
    return found


def _checked(rows: Iterable[tuple[str, Row]]) -> Iterator[Row]:
    for where, row in rows:
        if not any(text.strip() for text in row.values()):
            raise DataError(f"{where}: holds no text")
        try:
            "".join(row.values()).encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{where}: is not Unicode text: {error}") from None
        yield row
