"""How a table's columns are texts to be generated."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fedhpc.commands.init.columns import field_names, label_columns, text_columns
from fedhpc.data.generation import COLUMNS, TRAINED, Format
from fedhpc.data.readers import Record
from fedhpc.errors import DataError

PAIRS: tuple[Format, ...] = ("alpaca", "prompt-response")
"""Formats that are known by the names of their columns; alpaca's `input` may be missing."""
CONVERSATIONS = ("messages", "conversations")
"""Columns that are taken for the conversations where there are several."""
OWNERS = (
    *("device", "client", "user", "author", "writer", "speaker", "customer", "account", "person", "patient"),
    *("hospital", "site"),
)
"""Columns that are taken for the devices, in any case, also with `id` or `name` behind."""
SEVERAL = 4
"""Examples of a device, on average, at least: a batch."""


class Layout(NamedTuple):
    """What of the columns is the prompt, and what is to be generated."""

    format: Format
    columns: dict[str, str]
    """Field -> column."""
    template: str | None
    """The text before the response, where the format's own does not do."""


def find_layout(file: Path, records: Sequence[Record], texts: Sequence[str], answer: str | None) -> Layout | None:
    """How the columns are texts to be generated; None if they are labelled texts, or seem to be neither.

    Args:
        file: names them in messages.
        records: the training examples.
        texts: the columns before the response; found out unless given, which without a response means labelled texts.
        answer: the response's column; found out unless given.

    Raises:
        DataError: they can be read in two ways.
    """
    columns = list(records[0])
    talks = [column for column in columns if any(_is_conversation(column, record.get(column)) for record in records)]
    pairs = [pair for pair in PAIRS if set(COLUMNS[pair].values()) - {"input"} <= set(columns)]
    if answer is not None:
        return _named(file, records, texts, answer, talks, pairs)
    if texts:
        return None
    talks = [column for column in talks if column in CONVERSATIONS] or talks
    found = talks or [COLUMNS[pair][TRAINED[pair]] for pair in pairs]
    rivals = [] if talks else label_columns(columns)
    if len(found) > 1 or (found and rivals):
        labelled = f", or {' or '.join(rivals)} the label's: --label COLUMN" if rivals else ""
        raise DataError(
            f"{file}: {' or '.join(found)} may be the column to be generated: name it, --response COLUMN{labelled}; "
            f"there are {', '.join(columns)}"
        )
    if talks:
        return Layout("messages", {"messages": talks[0]}, None)
    if pairs:
        return _pair(pairs[0], columns)
    may_be_label = [column for column in columns if column != "text" and repeats(records, column, 2)]
    if "text" in columns and isinstance(records[0]["text"], str) and not rivals and not may_be_label:
        return Layout("text", {"text": "text"}, None)
    return None


def _named(
    file: Path,
    records: Sequence[Record],
    texts: Sequence[str],
    answer: str,
    talks: Sequence[str],
    pairs: Sequence[Format],
) -> Layout:
    """The layout with a response that is named."""
    if answer in texts:
        raise DataError(f"--text {answer}: that is the response's column")
    if answer in talks:
        if texts:
            raise DataError(f"--text {texts[0]}: {answer} holds conversations, before which no text can stand")
        return Layout("messages", {"messages": answer}, None)
    pair = next((pair for pair in pairs if COLUMNS[pair][TRAINED[pair]] == answer), None)
    if pair and not texts:
        return _pair(pair, list(records[0]))
    prompts = list(texts) or text_columns(records, [column for column in records[0] if column != answer])
    if len(prompts) > 1 and not texts:
        raise DataError(
            f"{file}: {' and '.join(prompts)} may stand before {answer}; name those that do, in their order: "
            "--text COLUMN ..."
        )
    if not prompts:
        return Layout("text", {"text": answer}, None)
    fields = ["prompt"] if len(prompts) == 1 else field_names(prompts, ("response",))
    shown = "\n".join(f"{{{field}}}" for field in fields)
    return Layout(
        "prompt-response",
        {**dict(zip(fields, prompts, strict=True)), "response": answer},
        shown if fields[1:] else None,
    )


def _pair(pair: Format, columns: Sequence[str]) -> Layout:
    return Layout(pair, {field: column for field, column in COLUMNS[pair].items() if column in columns}, None)


def _is_conversation(column: str, value: Any) -> bool:
    is_turn = isinstance(value, list) and value and isinstance(value[0], Mapping) and {"role", "from"} & set(value[0])
    return bool(is_turn) or (isinstance(value, list) and column in CONVERSATIONS)


def repeats(records: Sequence[Record], column: str, each: int) -> bool:
    """Whether a column has a few names or whole numbers, of so many examples each on average."""
    return 2 <= len(values_of(records, column)) <= len(records) / each


def values_of(records: Sequence[Record], column: str) -> Counter[str]:
    """The names or whole numbers in a column, with the examples of each; none if it holds anything else."""
    values = [record.get(column) for record in records]
    if not all((isinstance(value, str) and value.strip()) or isinstance(value, int) for value in values):
        return Counter()
    return Counter(str(value) for value in values)


def device_columns(splits: Sequence[Sequence[Record]], layout: Layout) -> dict[str, int]:
    """The columns that are no part of the texts and repeat, and how many values each has.

    Args:
        splits: records of the training examples, and of others.
        layout: of the texts.
    """
    train, *others = splits
    free = [column for column in train[0] if column not in layout.columns.values()]
    return {
        column: len(values_of(train, column))
        for column in free
        if repeats(train, column, SEVERAL) and all(values_of(records, column) for records in others)
    }


def owner_column(columns: Sequence[str]) -> str | None:
    """The one that is called like somebody who owns texts, if there is one alone."""
    named = [
        column for column in columns if column.lower().removesuffix("id").removesuffix("name").rstrip("_- ") in OWNERS
    ]
    return named[0] if len(named) == 1 else None
