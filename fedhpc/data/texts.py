"""New texts on their way to a model, each with its place in the source: read, checked and tokenised in one way."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from fedhpc.data.readers import Record, text_value
from fedhpc.data.tokens import EncodedText, TextEncoder, check_known
from fedhpc.errors import DataError

BATCH = 1000

Row = Mapping[str, str]
"""Template field -> text."""


@dataclass(frozen=True, kw_only=True)
class Texts:
    """The text fields of some examples."""

    unit: str
    """What the numbers count, as `train.tsv line`."""
    numbers: Sequence[int]
    rows: Sequence[Row]

    def place(self, index: int) -> str:
        """Where an example stands in the source."""
        return f"{self.unit} {self.numbers[index]}"

    def check_blank(self, fields: Iterable[str]) -> None:
        """DataError for examples of which a template that shows these fields would show no text."""
        shown = list(fields)
        blank = [index for index, row in enumerate(self.rows) if not any(row[name].strip() for name in shown)]
        if blank:
            more = f", nor do {len(blank) - 1} others" if len(blank) > 1 else ""
            raise DataError(f"{self.place(blank[0])}: holds no text{more}")


def text_fields(record: Record, columns: Mapping[str, str]) -> Row:
    """A record's text fields, from their columns; ValueError for what is no text."""
    return {name: text_value(record.get(column), column) for name, column in columns.items()}


def encode(
    rows: Sequence[Row], place: Callable[[int], str], encoder: TextEncoder, vocabulary_size: int | None
) -> Iterator[EncodedText]:
    """Every example as tokens; `place` says by its index where one stands in the source.

    Raises:
        DataError: with the place of an example that cannot be tokenised, or whose tokens the model does not know.
    """
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        try:
            encoded = encoder(batch)
        except DataError:
            for index, row in enumerate(batch, start):
                try:
                    encoder([row])
                except DataError as error:
                    raise DataError(f"{place(index)}: {error}") from None
            raise
        for index, example in enumerate(encoded, start):
            check_known(place(index), example.ids, encoder.tokenizer, vocabulary_size)
            yield example
