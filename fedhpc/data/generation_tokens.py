"""How an example of generated text becomes tokens: its pieces one by one, too long an example shortened.

What is trained is tokenised apart from what stands before it. So the tokens before an answer are those that the model
is given when it has to answer, whatever the answer begins with.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any, Literal, NamedTuple

from fedhpc.data.generation import Rendered, Span
from fedhpc.data.tokens import tokenize
from fedhpc.errors import ModelError

Overlong = Literal["drop", "cut-prompt", "cut-response"]


class Example(NamedTuple):
    """An example as tokens."""

    ids: list[int]
    spans: list[Span]
    """Trained tokens, ascending; never the first token, which nothing predicts. None where the source has none."""
    cut: bool
    """Whether tokens were left out."""


class _Anchor(NamedTuple):
    """What a piece of a text is tokenised behind, since it does not begin the text."""

    text: str
    ids: list[int]


NOTHING = _Anchor("", [])


@dataclass(kw_only=True)
class _Piece:
    """A piece of an example's text, and its tokens."""

    text: str
    start: int
    """Of its characters in the example's."""
    is_trained: bool
    anchor: _Anchor = NOTHING
    encoding: Any = None
    """Of anchor and text, of the tokenizers library."""
    ids: list[int] = field(default_factory=list)

    def offsets(self) -> list[Span]:
        """Characters of each token in the example's text."""
        skipped, shift = len(self.anchor.ids), self.start - len(self.anchor.text)
        own = self.encoding.offsets[skipped : skipped + len(self.ids)]
        return [(max(self.start, begin + shift), end + shift) for begin, end in own]


class GenerationEncoder:
    """Tokenises rendered examples with a fast Hugging Face tokenizer; what stands behind the last response is left out.

    Args:
        tokenizer: the model's.
        chat: whether the text has the special tokens that it needs; else it begins as the tokenizer begins texts, and
            ends with the end token, which is trained.
        max_length: tokens of an example, at most.
        overlong: what becomes of a longer one: it is left out, its prompt's fields lose their beginning, or it loses
            its end. What is too long still, or has lost all of its trained tokens, is left out.

    Raises:
        ModelError: the tokenizer knows no letter.
    """

    def __init__(self, tokenizer: Any, *, chat: bool, max_length: int, overlong: Overlong = "cut-prompt") -> None:
        self._tokenizer, self._chat, self._max_length, self._overlong = tokenizer, chat, max_length, overlong
        special = tokenize(tokenizer, "a", return_special_tokens_mask=True)["special_tokens_mask"]
        if all(special):
            raise ModelError("the tokenizer knows no letter: it makes no token of 'a'")
        self._leading: int = 0 if chat else special.index(0)
        self._trailing: int = 0 if chat else special[::-1].index(0)
        self._end = [] if chat or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self._added: dict[str, int] = tokenizer.get_added_vocab()
        self._added_sizes = sorted({len(token) for token in self._added}, reverse=True)
        # Some tokenizers put a space before whatever a text begins with; behind a line end they do not.
        line, word, both = (encoding.ids for encoding in self._encodings(["\n", "a", "\na"]))
        self._line = NOTHING if both == line + word else _Anchor("\n", line)

    def __call__(self, rendered: Sequence[Rendered]) -> Iterator[Example | None]:
        """Every example; None for one that is too long.

        Raises:
            DataError: the tokenizer cannot read one.
        """
        every = [list(_pieces(example)) for example in rendered]
        firsts = [own[0] for own in every]
        for piece, encoding in zip(firsts, self._encodings([piece.text for piece in firsts], begin=True), strict=True):
            piece.encoding, piece.ids = encoding, encoding.ids[: len(encoding.ids) - self._trailing]
        pairs = [pair for own in every for pair in pairwise(own)]
        for before, piece in pairs:
            piece.anchor = self._anchor(before.text)
        texts = [piece.anchor.text + piece.text for _, piece in pairs]
        for (_, piece), encoding in zip(pairs, self._encodings(texts), strict=True):
            piece.encoding = encoding
            if encoding.ids[: len(piece.anchor.ids)] != piece.anchor.ids:  # the anchor has become one with the piece
                piece.anchor = NOTHING
                (piece.encoding,) = self._encodings([piece.text])
            piece.ids = piece.encoding.ids[len(piece.anchor.ids) :]
        for example, own in zip(rendered, every, strict=True):
            yield self._example(own, example.cuttable)

    def prompt(self, text: str) -> list[int]:
        """The tokens of what stands before an answer, however many."""
        (encoding,) = self._encodings([text], begin=True)
        return list(encoding.ids[: len(encoding.ids) - self._trailing])

    def _anchor(self, before: str) -> _Anchor:
        """Of a piece behind this text: the special token that ends it, or a line end."""
        for size in self._added_sizes:
            if (token := before[-size:]) in self._added:
                return _Anchor(token, [self._added[token]])
        return self._line

    def _encodings(self, texts: list[str], *, begin: bool = False) -> list[Any]:
        """Of texts, with the special tokens that begin and end them if they are to `begin` an example."""
        if not texts:
            return []
        options = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
        special = begin and not self._chat
        found: list[Any] = tokenize(self._tokenizer, texts, add_special_tokens=special, **options).encodings
        return found

    def _example(self, pieces: list[_Piece], cuttable: Sequence[Span]) -> Example | None:
        pieces[-1].ids = pieces[-1].ids + self._end
        excess = sum(len(piece.ids) for piece in pieces) - self._max_length
        spans = self._spans(pieces)
        if excess > 0 and spans:
            if self._overlong == "cut-prompt":
                _cut_beginning(pieces, cuttable, excess)
            elif self._overlong == "cut-response":
                _cut_end(pieces, excess)
            spans = self._spans(pieces)
            if not spans or sum(len(piece.ids) for piece in pieces) > self._max_length:
                return None
        return Example([token for piece in pieces for token in piece.ids], spans, excess > 0)

    def _spans(self, pieces: list[_Piece]) -> list[Span]:
        ends = accumulate((len(piece.ids) for piece in pieces), initial=0)
        first = max(self._leading, 1)
        spans = [(max(begin, first), end) for begin, end in pairwise(ends)]
        return [span for piece, span in zip(pieces, spans, strict=True) if piece.is_trained and span[0] < span[1]]


def _pieces(rendered: Rendered) -> Iterator[_Piece]:
    """An example's text, cut where something trained begins or ends."""
    place = 0
    for begin, end in rendered.trained:
        if place < begin:
            yield _Piece(text=rendered.text[place:begin], start=place, is_trained=False)
        yield _Piece(text=rendered.text[begin:end], start=begin, is_trained=True)
        place = end


def _cut_beginning(pieces: list[_Piece], cuttable: Sequence[Span], excess: int) -> None:
    """Leave out the first ``excess`` tokens, or a few more lest a character be halved, that are within `cuttable`."""
    for piece in pieces:
        if piece.is_trained or excess <= 0:
            continue
        offsets = piece.offsets()
        fields = [(first, last, _spaces_before(piece, first)) for first, last in cuttable]
        # Some tokenizers give a lone space an empty place, as they do to the tokens around the text.
        inside = [
            number
            for number, (start, end) in enumerate(offsets)
            if any(first - spaces <= start < last and first < end <= last for first, last, spaces in fields)
        ]
        count = min(excess, len(inside))
        while 0 < count < len(inside) and offsets[inside[count]][0] < offsets[inside[count - 1]][1]:
            count += 1
        dropped = set(inside[:count])
        piece.ids = [token for number, token in enumerate(piece.ids) if number not in dropped]
        excess -= count


def _spaces_before(piece: _Piece, place: int) -> int:
    """Spaces that stand before a character of the text, which may be one token with what begins there."""
    before = piece.text[: max(0, place - piece.start)]
    return len(before) - len(before.rstrip(" "))


def _cut_end(pieces: list[_Piece], excess: int) -> None:
    """Leave out the last ``excess`` tokens."""
    for piece in reversed(pieces):
        kept = max(0, len(piece.ids) - excess)
        excess -= len(piece.ids) - kept
        piece.ids = piece.ids[:kept]
