"""Files of examples: TSV, unquoted, with a header line; or JSON lines."""

import json
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedhpc.errors import DataError

JSON_LINES = (".jsonl", ".json", ".ndjson")
TABLES = (".tsv", *JSON_LINES)
OTHER_TABLES = (".csv", ".parquet", ".xlsx", ".xls")
Record = Mapping[str, Any]
"""Column -> value."""


def read_lines(file: Path) -> list[str]:
    """The lines of a text file.

    Raises:
        DataError: it cannot be read, is not UTF-8, or is a table of a form that is not read.
    """
    if file.suffix.lower() in OTHER_TABLES:
        raise DataError(f"{file}: {file.suffix.lower()} is not read; give TSV with a header line, or JSON lines")
    try:
        # Only "\n" ends a line: text may hold other characters that str.splitlines takes for line ends.
        lines = file.read_bytes().decode("utf-8-sig").removesuffix("\n").split("\n")
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    return [line.removesuffix("\r") for line in lines]


def read_table(
    file: Path, *, headerless: Sequence[str] = (), labels: Container[str] = ()
) -> tuple[Iterator[Record], int]:
    """The records of a file, and the number of the first one's line; a malformed one raises ValueError.

    Args:
        headerless: columns of a TSV file that has no header line, if as many stand there, with one of `labels`.

    Raises:
        DataError: the file cannot be read, or has two columns of one name.
    """
    lines = read_lines(file)
    if file.suffix.lower() in JSON_LINES:
        return map(_json_record, lines), 1
    header, first_line = lines[0].split("\t"), 2
    if headerless and len(headerless) == len(header) and dict(zip(headerless, header, strict=True))["label"] in labels:
        header, first_line = list(headerless), 1
    if (name := _twice(header)) is not None:
        raise DataError(f"{file}: column {name!r} stands twice in the header line; rename one")
    return (_tsv_record(header, line) for line in lines[first_line - 1 :]), first_line


def _tsv_record(header: list[str], line: str) -> Record:
    values = line.split("\t")
    if len(values) != len(header):
        raise ValueError(f"{len(values)} columns, expected {len(header)}: {', '.join(header)}")
    return dict(zip(header, values, strict=True))


def _json_record(line: str) -> Record:
    try:
        record = json.loads(line, object_pairs_hook=_json_object)
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg} at column {error.colno}; expected one JSON object a line") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(record, dict):
        raise ValueError(f"expected one JSON object a line, found {type(record).__name__}")
    return record


def _json_object(pairs: list[tuple[str, Any]]) -> Record:
    if (name := _twice(name for name, _ in pairs)) is not None:
        raise ValueError(f"key {name!r} stands twice in an object")
    return dict(pairs)


def _twice(names: Iterable[str]) -> str | None:
    """The first name that was there before."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def text_value(value: Any, column: str) -> str:
    """A column's value, which must be text; else ValueError."""
    if not isinstance(value, str):
        found = repr(value) if value is None or isinstance(value, int | float) else f"a {type(value).__name__}"
        raise ValueError(f"column {column!r} holds {found}, expected text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"column {column!r} is not Unicode text: {error}") from None
    return value
