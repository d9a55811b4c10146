"""Files of examples: TSV, unquoted, with a header line; or JSON lines."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedhpc.errors import DataError

JSON_LINES = (".jsonl", ".json", ".ndjson")
Record = Mapping[str, Any]
"""Column -> value."""


def read_lines(file: Path) -> list[str]:
    """The lines of a text file.

    Raises:
        DataError: it cannot be read, or is not UTF-8.
    """
    try:
        # Only "\n" ends a line: text may hold other characters that str.splitlines takes for line ends.
        lines = file.read_bytes().decode("utf-8-sig").removesuffix("\n").split("\n")
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    return [line.removesuffix("\r") for line in lines]


def read_table(
    file: Path, *, headerless: Sequence[str] = (), known: Sequence[str] = ()
) -> tuple[Iterator[Record], int]:
    """The records of a file, and the number of the first one's line; a malformed one raises ValueError.

    Args:
        headerless: columns of a TSV file that has as many and no header line.
        known: columns of which a header line has at least one.

    Raises:
        DataError: the file cannot be read, or has two columns of one name.
    """
    lines = read_lines(file)
    if file.suffix.lower() in JSON_LINES:
        return map(_json_record, lines), 1
    header, first_line = lines[0].split("\t"), 2
    if len(headerless) == len(header) and not set(header) & set(known):
        header, first_line = list(headerless), 1
    if twice := [name for place, name in enumerate(header) if name in header[:place]]:
        raise DataError(f"{file}: column {twice[0]!r} stands twice in the header line; rename one")
    return (_tsv_record(header, line) for line in lines[first_line - 1 :]), first_line


def _tsv_record(header: list[str], line: str) -> Record:
    values = line.split("\t")
    if len(values) != len(header):
        raise ValueError(f"{len(values)} columns, expected {len(header)}: {', '.join(header)}")
    return dict(zip(header, values, strict=True))


def _json_record(line: str) -> Record:
    record = json.loads(line)
    if not isinstance(record, dict):
        raise ValueError(f"expected one JSON object a line, found {type(record).__name__}")
    return record
