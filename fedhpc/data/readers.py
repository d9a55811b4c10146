"""Files of examples: TSV, unquoted, or CSV, both with a header line; JSON lines; Parquet."""

import csv
import io
import json
import sys
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fedhpc.errors import DataError

JSON_LINES = (".jsonl", ".json", ".ndjson")
TABLES = (".tsv", ".csv", *JSON_LINES, ".parquet")
OTHER_TABLES = (".xlsx", ".xls")
Record = Mapping[str, Any]
"""Column -> value."""


class Records(NamedTuple):
    """The records of a file, or of a split of a data set."""

    unit: str
    """What the numbers count, as `train.tsv line`."""
    numbers: Sequence[int]
    """Of each record; in a CSV file known as far as it has been read."""
    each: Iterable[Record]
    """A malformed one raises ValueError."""
    class_names: Mapping[str, Sequence[str]] = {}
    """Column of numbered classes -> their names."""

    def place(self, index: int) -> str:
        """Where a record stands."""
        return f"{self.unit} {self.numbers[index]}"

    @property
    def source(self) -> str:
        """The file, or the split."""
        return self.unit.rpartition(" ")[0]


def read_lines(file: Path) -> list[str]:
    """The lines of a text file.

    Raises:
        DataError: it cannot be read, is not UTF-8, or is a table of a form that is not read.
    """
    # Only "\n" ends a line: text may hold other characters that str.splitlines takes for line ends.
    return [line.removesuffix("\r") for line in _text(file).removesuffix("\n").split("\n")]


def _text(file: Path) -> str:
    if file.suffix.lower() in OTHER_TABLES:
        raise DataError(
            f"{file}: {file.suffix.lower()} is not read; give TSV or CSV with a header line, JSON lines, or Parquet"
        )
    try:
        return file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error


def read_table(file: Path, *, headerless: Sequence[str] = (), labels: Container[str] = ()) -> Records:
    """The records of a file, each with the number of its line, which is its first line in CSV; of its row in Parquet.

    Args:
        headerless: columns of a TSV file that has no header line, if as many stand there, with one of `labels`.

    Raises:
        DataError: the file cannot be read, or has two columns of one name.
    """
    suffix = file.suffix.lower()
    if suffix == ".parquet":
        return _read_parquet(file)
    if suffix == ".csv":
        return _read_csv(file)
    lines = read_lines(file)
    if suffix in JSON_LINES:
        return Records(f"{file} line", range(1, 1 + len(lines)), map(_json_record, lines))
    header, first_line = lines[0].split("\t"), 2
    if headerless and len(headerless) == len(header) and dict(zip(headerless, header, strict=True))["label"] in labels:
        header, first_line = list(headerless), 1
    _check_header(file, header)
    records = (_record(header, line.split("\t")) for line in lines[first_line - 1 :])
    return Records(f"{file} line", range(first_line, 1 + len(lines)), records)


def _read_csv(file: Path) -> Records:
    """A file as RFC 4180 has it: a field in quotes may hold commas, line ends, and doubled quotes."""
    csv.field_size_limit(sys.maxsize)  # the usual one is 131,072 characters
    rows = csv.reader(io.StringIO(_text(file), newline="\n"), strict=True)
    try:
        header = next(rows, [])
    except csv.Error as error:
        raise DataError(f"{file} line 1: not CSV: {error}") from None
    _check_header(file, header)
    numbers: list[int] = []
    return Records(f"{file} line", numbers, _csv_records(rows, header, numbers))


def _csv_records(rows: Any, header: list[str], numbers: list[int]) -> Iterator[Record]:
    while True:
        numbers.append(rows.line_num + 1)
        try:
            values = next(rows, None)
        except csv.Error as error:
            raise ValueError(f"not CSV: {error}") from None
        if values is None:
            return
        yield _record(header, values or [""])


def _read_parquet(file: Path) -> Records:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise DataError(f"{file}: Parquet is read with pyarrow, which is not installed: pip install pyarrow") from None
    try:
        table = parquet.ParquetFile(file)
    except (ArrowException, OSError) as error:
        raise DataError(f"{file}: no readable Parquet file: {_first_line(error)}") from None
    _check_header(file, table.schema_arrow.names)

    def records() -> Iterator[Record]:
        try:
            for batch in table.iter_batches(batch_size=1000):
                yield from batch.to_pylist()
        except (ArrowException, OSError) as error:
            raise ValueError(f"cannot be read: {_first_line(error)}") from None

    return Records(f"{file} row", range(table.metadata.num_rows), records(), _class_names(table.schema_arrow.metadata))


def _class_names(metadata: Mapping[bytes, bytes] | None) -> dict[str, Sequence[str]]:
    """Those that the datasets library leaves in the files it writes."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return {column: feature["names"] for column, feature in features.items() if "names" in feature}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def _check_header(file: Path, header: Sequence[str]) -> None:
    if (name := _twice(header)) is not None:
        raise DataError(f"{file}: column {name!r} stands twice in the header line; rename one")


def _record(header: list[str], values: list[str]) -> Record:
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
