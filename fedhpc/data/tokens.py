"""How text becomes tokens: templates filled in, too long an example shortened, class words looked up."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from fedhpc.data.tasks import FIELD, PLACEHOLDER, Kind
from fedhpc.errors import DataError, ModelError

NO_LIMIT = 1 << 30
"""Tokens of a text that is not to be shortened."""


def check_known(what: str, ids: Iterable[int], tokenizer: Any, vocabulary_size: int | None) -> None:
    """DataError where the model's embeddings have no row for a token; `what` begins the message."""
    if vocabulary_size is not None and (largest := max(ids, default=0)) >= vocabulary_size:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise DataError(
            f"{what}: its token {largest} ({token!r}) has no row in the embeddings: the model knows {vocabulary_size} "
            "tokens; resize them to the tokenizer (model.resize_token_embeddings), or do without that token"
        )


def tokenize(tokenizer: Any, text: str | list[str], **options: Any) -> Any:
    """What a Hugging Face tokenizer makes of a text, or of several; DataError for what it cannot read."""
    try:
        return tokenizer(text, **options)
    except Exception as error:
        if type(error) is not Exception:  # tokenizers has no class of its own
            raise
        raise DataError(f"the tokenizer cannot read it: {error}") from None


class EncodedText(NamedTuple):
    """One example as a backbone sees it."""

    ids: list[int]
    slot: int
    """Where the answer is read: the mask token (or token 0) of an encoder, the last token of a decoder."""
    truncated: bool


class _Rendered(NamedTuple):
    text: str
    fields: list[tuple[int, int]]
    """Start and end of each text field in the text."""
    mask: int
    """Start of the mask token in the text; -1 without one."""


class TextEncoder:
    """Applies a template to text fields and tokenises the result with a fast Hugging Face tokenizer.

    Too long an example loses tokens from the end of its longest field first; the template always stays whole.
    Decoders get no end-of-text token, and nothing of the template from ``{word}`` on.
    """

    def __init__(self, template: str, tokenizer: Any, *, kind: Kind, max_length: int):
        self.tokenizer = tokenizer
        self._kind = kind
        self._max_length = max_length
        self._parts = re.split(f"({PLACEHOLDER.pattern})", template.split("{word}", maxsplit=1)[0].rstrip())
        added_for_one, added_for_two = (tokenizer.num_special_tokens_to_add(pair=pair) for pair in (False, True))
        self._separator = (tokenizer.sep_token or " ") * max(added_for_two - added_for_one, 1)
        special = tokenize(tokenizer, "a", return_special_tokens_mask=True)["special_tokens_mask"]
        if all(special):
            raise ModelError("the tokenizer knows no letter: it makes no token of 'a'")
        self.num_trailing = special[::-1].index(0) if kind == "decoder" else 0
        """Special tokens that the tokenizer puts behind a text, and that a decoder is not given."""

    def __call__(self, rows: Sequence[Mapping[str, str]]) -> list[EncodedText]:
        """Encode a batch of examples, each a mapping of the template's fields to their text."""
        rendered = [self._render(row) for row in rows]
        batch = tokenize(
            self.tokenizer,
            [item.text for item in rendered],
            truncation=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return [self._encode(batch, index, item) for index, item in enumerate(rendered)]

    def text(self, row: Mapping[str, str]) -> str:
        """An example as it is tokenised, the answer slot in it."""
        return self._render(row).text

    def _render(self, row: Mapping[str, str]) -> _Rendered:
        text, fields, mask = "", [], -1
        for part in self._parts:
            added = part
            if part == "<mask>":
                mask, added = len(text), self.tokenizer.mask_token
            elif part == "<sep>":
                added = self._separator
            elif field_name := FIELD.fullmatch(part):
                added = row[field_name[1]].strip()
                fields.append((len(text), len(text) + len(added)))
            text += added
        return _Rendered(text, fields, mask)

    def _encode(self, batch: Any, index: int, rendered: _Rendered) -> EncodedText:
        ids = batch["input_ids"][index]
        ids = ids[: len(ids) - self.num_trailing] or [self.tokenizer.eos_token_id or 0]
        slot = 0 if rendered.mask < 0 else batch.char_to_token(index, rendered.mask)
        if slot is None or (rendered.mask >= 0 and ids[slot] != self.tokenizer.mask_token_id):
            raise DataError(f"the tokenizer does not take the template's {self.tokenizer.mask_token} for one token")
        excess = len(ids) - self._max_length
        if excess > 0:
            dropped = self._tokens_to_drop(batch.encodings[index].offsets, rendered.fields, excess)
            ids = [token for position, token in enumerate(ids) if position not in dropped]
            slot -= sum(position < slot for position in dropped)
        return EncodedText(ids, len(ids) - 1 if self._kind == "decoder" else slot, excess > 0)

    def _tokens_to_drop(self, offsets: list[tuple[int, int]], fields: list[tuple[int, int]], excess: int) -> set[int]:
        inside = [
            # Some tokenizers give a lone space an empty place, as they do to the tokens around the text.
            [token for token, (start, end) in enumerate(offsets) if first <= start < last and first < end <= last]
            for first, last in fields
        ]
        kept = [len(tokens) for tokens in inside]
        if sum(kept) < excess:
            needed = self._max_length + excess - sum(kept)
            raise DataError(f"max_length {self._max_length} is too short: the template alone takes {needed} tokens")
        for _ in range(excess):
            kept[kept.index(max(kept))] -= 1
        return {token for tokens, length in zip(inside, kept, strict=True) for token in tokens[length:]}


def find_word_ids(words: Sequence[str], template: str, tokenizer: Any, *, kind: Kind) -> list[list[int]]:
    """The token ids of each class word as they appear in the answer slot; an encoder's slot holds one token.

    Raises:
        DataError: a word does not fit, or two are the same tokens.
    """
    # A letter stands for the text, so that the template is tokenised as it is inside a sentence.
    before = "a" + template.partition("{word}")[0].rpartition("}")[2]
    found: dict[tuple[int, ...], str] = {}
    for word in words:
        ids = _encoder_word_ids(tokenizer, word) if kind == "encoder" else _decoder_word_ids(tokenizer, word, before)
        twin = found.setdefault(tuple(ids), word)
        if twin != word:
            raise DataError(f"class words {twin!r} and {word!r} are the same to this model; {_OTHER_WORD}")
    return [list(ids) for ids in found]


_OTHER_WORD = "choose another word in a task file (`fedhpc init` writes one), or use --head linear"


def _encoder_word_ids(tokenizer: Any, word: str) -> list[int]:
    ids = list(tokenize(tokenizer, f" {word}", add_special_tokens=False)["input_ids"])
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        tokens = " ".join(tokenizer.convert_ids_to_tokens(ids))
        raise DataError(f"class word {word!r} is not one token of this model but {tokens}; {_OTHER_WORD}")
    return ids


def _decoder_word_ids(tokenizer: Any, word: str, before: str) -> list[int]:
    without, with_word = (
        list(tokenize(tokenizer, text, add_special_tokens=False)["input_ids"])
        for text in (before.rstrip(), before + word)
    )
    ids = with_word[len(without) :]
    if with_word[: len(without)] != without or not ids or tokenizer.unk_token_id in ids:
        tokens = " ".join(tokenizer.convert_ids_to_tokens(with_word))
        raise DataError(f"class word {word!r} does not stand apart from the text before it: {tokens}; {_OTHER_WORD}")
    return ids
