"""How an example of generated text becomes tokens: its pieces one by one, too long an example shortened.

What is trained is tokenised apart from what stands before it. So the tokens before an answer are those that the model
is given when it has to answer, whatever the answer begins with.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any, Literal, NamedTuple

from fedhpc.data.generation import Rendered, Span

Overlong = Literal["drop", "cut-prompt", "cut-response"]
BATCH = 1000


class Example(NamedTuple):
    """An example as tokens."""

    ids: list[int]
    spans: list[Span]
    """Trained tokens, ascending; never the first token, which nothing predicts."""
    cut: bool
    """Whether tokens were left out."""


class _Piece(NamedTuple):
    text: str
    start: int
    """Of its characters in the example's."""
    is_trained: bool


class GenerationEncoder:
    """Tokenises rendered examples with a fast Hugging Face tokenizer.

    Args:
        tokenizer: the model's.
        chat: whether the text has the special tokens that it needs; else it begins as the tokenizer begins texts, and
            ends with the end token, which is trained.
        max_length: tokens of an example, at most.
        overlong: what becomes of a longer one: it is left out, its prompt's fields lose their beginning, or its last
            response its end. What is too long still is left out.
    """

    def __init__(self, tokenizer: Any, *, chat: bool, max_length: int, overlong: Overlong = "cut-prompt") -> None:
        self._tokenizer, self._chat, self._max_length, self._overlong = tokenizer, chat, max_length, overlong
        special = tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"]
        self._leading, self._trailing = special.index(0), special[::-1].index(0)
        self._end = [] if chat or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        # Some tokenizers put a space before whatever a text begins with, and a piece does not begin the text.
        line, word = (self._ids([text])[0] for text in ("\n", "a"))
        self._before = [] if self._ids(["\na"])[0] == line + word else line

    def __call__(self, rendered: Sequence[Rendered]) -> Iterator[Example | None]:
        """Every example; None for one that is too long."""
        pieces = [list(_pieces(example)) for example in rendered]
        firsts = self._beginnings([own[0].text for own in pieces])
        others = iter(self._continuations([piece.text for own in pieces for piece in own[1:]]))
        for example, own, first in zip(rendered, pieces, firsts, strict=True):
            ids = [first, *(next(others) for _ in own[1:])]
            yield self._example(example, own, ids)

    def prompt(self, text: str) -> list[int]:
        """The tokens of what stands before an answer; its end if it is too long."""
        pieces = list(_pieces(Rendered(text, [], [])))
        return self._beginnings([pieces[0].text])[0]

    def _example(self, rendered: Rendered, pieces: list[_Piece], ids: list[list[int]]) -> Example | None:
        if pieces[-1].is_trained:
            ids[-1] = ids[-1] + self._end
        excess = sum(map(len, ids)) - self._max_length
        if excess > 0:
            if self._overlong == "drop":
                return None
            if self._overlong == "cut-prompt":
                ids = self._without_beginnings(rendered, pieces, ids, excess)
        spans = []
        for piece, (begin, end) in zip(pieces, pairwise(accumulate(map(len, ids), initial=0)), strict=True):
            span = max(begin, 1), min(end, self._max_length)
            if piece.is_trained and span[0] < span[1]:
                spans.append(span)
        whole = [token for own in ids for token in own]
        if not spans or (len(whole) > self._max_length and self._overlong != "cut-response"):
            return None
        return Example(whole[: self._max_length], spans, excess > 0)

    def _without_beginnings(
        self, rendered: Rendered, pieces: list[_Piece], ids: list[list[int]], excess: int
    ) -> list[list[int]]:
        """The pieces' tokens without the first ``excess`` ones that are within what may be left out."""
        kept = []
        for number, (piece, own) in enumerate(zip(pieces, ids, strict=True)):
            if piece.is_trained or excess == 0:
                kept.append(own)
                continue
            inside = set()
            for place, (start, end) in enumerate(self._offsets(piece.text, first=number == 0)):
                begin, until = piece.start + start, piece.start + end
                if any(first <= begin < until <= last for first, last in rendered.cuttable):
                    inside.add(place)
            dropped = set(sorted(inside)[:excess])
            excess -= len(dropped)
            kept.append([token for place, token in enumerate(own) if place not in dropped])
        return kept

    def _offsets(self, text: str, *, first: bool) -> list[Span]:
        """Characters of each token of a piece."""
        before = "" if first or not self._before else "\n"
        encoding = self._tokenizer(
            before + text, add_special_tokens=first and not self._chat, return_offsets_mapping=True, verbose=False
        )
        skipped = 0 if first else len(self._before)
        offsets = encoding["offset_mapping"][skipped:]
        return [(max(0, start - len(before)), end - len(before)) for start, end in offsets]

    def _beginnings(self, texts: list[str]) -> list[list[int]]:
        if self._chat:
            return self._ids(texts)
        each = self._ids(texts, add_special_tokens=True)
        return [ids[: len(ids) - self._trailing] for ids in each]

    def _continuations(self, texts: list[str]) -> list[list[int]]:
        if not self._before:
            return self._ids(texts)
        return [ids[len(self._before) :] for ids in self._ids([f"\n{text}" for text in texts])]

    def _ids(self, texts: list[str], *, add_special_tokens: bool = False) -> list[list[int]]:
        if not texts:
            return []
        found: list[list[int]] = self._tokenizer(
            texts,
            add_special_tokens=add_special_tokens,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
        return found


def _pieces(rendered: Rendered) -> Iterator[_Piece]:
    """An example's text, cut where something trained begins or ends."""
    place = 0
    for begin, end in rendered.trained:
        if place < begin or not place:
            yield _Piece(rendered.text[place:begin], place, False)
        yield _Piece(rendered.text[begin:end], begin, True)
        place = end
    if place < len(rendered.text):
        yield _Piece(rendered.text[place:], place, False)
