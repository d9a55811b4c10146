"""What the columns of a table may be."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from fedhpc.data.readers import Record
from fedhpc.errors import DataError

LABELS = ("label", "labels", "class", "category", "target")
"""Columns that are taken for the label's, in any case."""


def check_columns(file: Path, records: Sequence[Record], named: Mapping[str, Iterable[str | None]]) -> None:
    """DataError for a column that an option names and that is not there."""
    columns = list(records[0])
    for option, names in named.items():
        for column in names:
            if column is not None and column not in columns:
                raise DataError(f"{option} {column}: {file} has no such column; there are {', '.join(columns)}")


def label_columns(columns: Iterable[str]) -> list[str]:
    """Those that are called so."""
    return [column for column in columns if column.lower() in LABELS]


def text_columns(records: Sequence[Record], columns: Sequence[str], *, words: int = 2) -> list[str]:
    """Those of text, with so many words or more on average."""
    cells_of = {column: [record.get(column) for record in records] for column in columns}
    return [
        column
        for column, cells in cells_of.items()
        if all(isinstance(cell, str) for cell in cells)
        and sum(len(str(cell).split()) for cell in cells) >= words * len(cells)
    ]


def field_names(columns: Sequence[str], taken: Iterable[str]) -> list[str]:
    """Names for columns in a template: their own, unless one of these cannot stand there, or is `taken`."""
    if all(re.fullmatch(r"\w+", column) and column not in taken for column in columns):
        return list(columns)
    return [f"text{number}" for number in range(1, 1 + len(columns))]
