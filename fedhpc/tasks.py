"""Tasks: what the columns, classes and templates of a data set are, and how its text becomes tokens.

The ten built-in tasks follow the templates of the FedPepTAO release; any other is a small YAML file. A template is
plain text with ``{field}`` for a text column and one answer slot: ``<mask>`` for encoders, ``{word}`` for decoders.
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fedhpc.errors import ConfigError, DataError
from fedhpc.yaml_files import YAML_ERRORS, read_texts

Kind = Literal["encoder", "decoder"]
Head = Literal["verbalizer", "linear"]

METRICS = ("accuracy", "matthews", "accuracy_f1")
SPLITS = {
    "train": ("train.tsv", "train.jsonl"),
    "validation": ("dev.tsv", "validation.tsv", "dev.jsonl", "val.jsonl", "validation.jsonl"),
}
_COLUMN_ALIASES = {
    "sentence": ("text",),
    "#1 String": ("sentence1",),
    "#2 String": ("sentence2",),
    "Quality": ("label",),
    "answer": ("label",),
    "label": ("coarse_label",),
}
"""Names that the built-in tasks' columns have in other distributions of the same data."""
_FIELD = re.compile(r"\{(\w+)\}")
_PLACEHOLDER = re.compile(r"\{\w+\}|<mask>|<sep>")


@dataclass(frozen=True, kw_only=True)
class Task:
    """One classification task: where its text and labels are, and how they are put as a cloze."""

    name: str
    columns: dict[str, str]
    """Template field -> source column; the label column stands under ``label``."""
    classes: dict[str, str]
    """Label value as the source writes it -> class word, in class order."""
    encoder_template: str = ""
    decoder_template: str = ""
    metric: str = "accuracy"
    splits: dict[str, tuple[str, ...]] = field(default_factory=lambda: dict(SPLITS))
    """Split -> file names to look for, the first found is taken."""

    @property
    def fields(self) -> list[str]:
        """The text fields, in the order of the columns."""
        return [name for name in self.columns if name != "label"]

    def column_names(self, name: str) -> tuple[str, ...]:
        """The source columns that may hold a field, the usual one first."""
        column = self.columns[name]
        return (column, *_COLUMN_ALIASES.get(column, ())) if self in TASKS.values() else (column,)

    def template(self, *, kind: Kind, head: Head) -> str:
        """The template for one kind of backbone, or ConfigError; a linear head needs the text alone."""
        if head == "linear":
            return ("<sep>" if kind == "encoder" else " ").join(f"{{{name}}}" for name in self.fields)
        template = self.encoder_template if kind == "encoder" else self.decoder_template
        if not template:
            raise ConfigError(f"task {self.name} has no template.{kind}, which this backbone needs")
        return template


def _single(
    name: str, classes: dict[str, str], metric: str = "accuracy", encoder: str = "{a} . It was <mask> ."
) -> Task:
    return Task(
        name=name,
        columns={"a": "sentence", "label": "label"},
        classes=classes,
        encoder_template=encoder,
        decoder_template="{a} It was {word} .",
        metric=metric,
    )


def _pair(name: str, columns: dict[str, str], classes: dict[str, str], metric: str = "accuracy") -> Task:
    first, second = [name for name in columns if name != "label"]
    return Task(
        name=name,
        columns=columns,
        classes=classes,
        encoder_template=f"{{{first}}} ? <mask> , {{{second}}}",
        decoder_template=f"{{{first}}} {{{second}}} They are {{word}} .",
        metric=metric,
    )


_SENTIMENT = {"0": "terrible", "1": "great"}
_ENTAILMENT = {"entailment": "Yes", "not_entailment": "No"}
_QUESTION_TYPES = {
    "DESC": "Description",
    "ENTY": "Entity",
    "ABBR": "Expression",
    "HUM": "Human",
    "LOC": "Location",
    "NUM": "Number",
}

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        _single("sst-2", _SENTIMENT),
        _single("mr", _SENTIMENT),
        _single("mpqa", _SENTIMENT),
        _single("cola", {"0": "unacceptable", "1": "acceptable"}, "matthews"),
        _single("subj", {"0": "subjective", "1": "objective"}),
        _single("trec", _QUESTION_TYPES, encoder="<mask> : {a}"),
        _pair("rte", {"a": "sentence1", "b": "sentence2", "label": "label"}, _ENTAILMENT),
        _pair("qnli", {"a": "question", "b": "sentence", "label": "label"}, _ENTAILMENT),
        _pair(
            "mrpc",
            {"a": "#1 String", "b": "#2 String", "label": "Quality"},
            {"0": "No", "1": "Yes"},
            "accuracy_f1",
        ),
        _pair(
            "boolq",
            {"question": "question", "passage": "passage", "label": "answer"},
            {"false": "No", "true": "Yes"},
        ),
    )
}


def load_task(name_or_path: str | Path) -> Task:
    """A built-in task by name, or one described by a YAML file; ConfigError if it is neither."""
    name = str(name_or_path)
    if name in TASKS:
        return TASKS[name]
    path = Path(name)
    if not path.is_file():
        raise ConfigError(f"task {name!r} is neither a task file nor one of {', '.join(TASKS)}{_nearest(name, TASKS)}")
    try:
        content = read_texts(path.read_text(encoding="utf-8"))
    except YAML_ERRORS as error:
        raise ConfigError(f"{path}: not a YAML file: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: a task file is a mapping with the keys {', '.join(_KEYS)}")
    problems = list(_problems(content))
    if problems:
        raise ConfigError("\n".join(f"{path}: {problem}" for problem in problems))
    template = content["template"]
    return Task(
        name=content["task"],
        columns=content["columns"],
        classes=content["classes"],
        encoder_template=template.get("encoder", ""),
        decoder_template=template.get("decoder", ""),
        metric=content.get("metric", "accuracy"),
        splits=SPLITS | {split: (file,) for split, file in content.get("splits", {}).items()},
    )


_KEYS: dict[str, type] = {
    "task": str,
    "columns": dict,
    "classes": dict,
    "template": dict,
    "metric": str,
    "splits": dict,
}
_REQUIRED = ("task", "columns", "classes", "template")


def _problems(content: dict[str, Any]) -> Iterable[str]:
    """Everything that is wrong with a task file."""
    yield from _unknown("", content, _KEYS)
    yield from (f"{key}: missing" for key in _REQUIRED if key not in content)
    malformed = [key for key, kind in _KEYS.items() if key in content and not _well_formed(content[key], kind)]
    for key in malformed:
        yield f"{key}: expected {'text' if _KEYS[key] is str else 'a mapping of text to text'}, none of it empty"
    sound = {key: value for key, value in content.items() if key not in malformed}
    columns, classes = sound.get("columns"), sound.get("classes")
    if columns is not None and ("label" not in columns or len(columns) < 2):
        yield "columns: needs the label column under `label`, and at least one text field"
    for name in columns or ():
        if name == "word" or not re.fullmatch(r"\w+", name):
            yield f"columns.{name}: a template cannot name this field; use letters, digits and _, and not `word`"
    if classes is not None and (len(classes) < 2 or len(set(classes.values())) < len(classes)):
        yield "classes: needs at least two label values, each with a class word of its own"
    if "metric" in sound and sound["metric"] not in METRICS:
        yield f"metric: {sound['metric']!r} is none of {', '.join(METRICS)}"
    yield from _unknown("splits.", sound.get("splits", {}), SPLITS)
    if "template" in sound:
        yield from _template_problems(sound["template"], [name for name in columns or () if name != "label"])


def _template_problems(template: dict[str, str], fields: list[str]) -> Iterable[str]:
    yield from _unknown("template.", template, ("encoder", "decoder"))
    if not template:
        yield "template: needs encoder, decoder or both"
    for kind, slot in (("encoder", "<mask>"), ("decoder", "{word}")):
        if kind not in template:
            continue
        found = [match.group() for match in _PLACEHOLDER.finditer(template[kind])]
        if found.count(slot) != 1:
            yield f"template.{kind}: needs exactly one {slot}, has {found.count(slot)}"
        valid = [f"{{{name}}}" for name in fields]
        for name in (name for name in found if name not in (slot, *valid)):
            yield f"template.{kind}: {name} is none of {', '.join([slot, *valid])}{_nearest(name, valid)}"
        if not set(found) & set(valid):
            yield f"template.{kind}: shows no text field; the columns give {', '.join(valid) or 'none'}"
        if kind == "decoder" and slot in found and found[-1] != slot:
            yield f"template.decoder: {found[-1]} stands after {{word}}, where the model never sees it"


def _well_formed(value: Any, kind: type) -> bool:
    texts = value.values() if kind is dict and isinstance(value, dict) else [value]
    return isinstance(value, kind) and all(isinstance(text, str) and text.strip() for text in texts)


def _unknown(prefix: str, found: Iterable[str], valid: Iterable[str]) -> Iterable[str]:
    valid = list(valid)
    for key in found:
        if key not in valid:
            yield f"{prefix}{key}: unknown; valid keys are {', '.join(valid)}{_nearest(key, valid)}"


def _nearest(name: str, valid: Iterable[str]) -> str:
    matches = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f"; did you mean {matches[0]}?" if matches else ""


def template_fields(template: str) -> list[str]:
    """The text fields that a template shows, in its order."""
    return list(dict.fromkeys(name for name in _FIELD.findall(template) if name != "word"))


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
        self._tokenizer = tokenizer
        self._kind = kind
        self._max_length = max_length
        self._parts = re.split(f"({_PLACEHOLDER.pattern})", template.split("{word}", maxsplit=1)[0].rstrip())
        added_for_one, added_for_two = (tokenizer.num_special_tokens_to_add(pair=pair) for pair in (False, True))
        self._separator = (tokenizer.sep_token or " ") * max(added_for_two - added_for_one, 1)
        special = tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"]
        self.num_trailing = special[::-1].index(0) if kind == "decoder" else 0
        """Special tokens that the tokenizer puts behind a text, and that a decoder is not given."""

    def __call__(self, rows: Sequence[Mapping[str, str]]) -> list[EncodedText]:
        """Encode a batch of examples, each a mapping of the template's fields to their text."""
        rendered = [self._render(row) for row in rows]
        batch = self._tokenizer(
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
                mask, added = len(text), self._tokenizer.mask_token
            elif part == "<sep>":
                added = self._separator
            elif field_name := _FIELD.fullmatch(part):
                added = row[field_name[1]].strip()
                fields.append((len(text), len(text) + len(added)))
            text += added
        return _Rendered(text, fields, mask)

    def _encode(self, batch: Any, index: int, rendered: _Rendered) -> EncodedText:
        ids = batch["input_ids"][index]
        ids = ids[: len(ids) - self.num_trailing] or [self._tokenizer.eos_token_id or 0]
        slot = 0 if rendered.mask < 0 else batch.char_to_token(index, rendered.mask)
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


_OTHER_WORD = "choose another word in a task file (see data_prep/tasks), or use --head linear"


def _encoder_word_ids(tokenizer: Any, word: str) -> list[int]:
    ids = list(tokenizer(f" {word}", add_special_tokens=False)["input_ids"])
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        tokens = " ".join(tokenizer.convert_ids_to_tokens(ids))
        raise DataError(f"class word {word!r} is not one token of this model but {tokens}; {_OTHER_WORD}")
    return ids


def _decoder_word_ids(tokenizer: Any, word: str, before: str) -> list[int]:
    without, with_word = (
        list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (before.rstrip(), before + word)
    )
    ids = with_word[len(without) :]
    if with_word[: len(without)] != without or not ids or tokenizer.unk_token_id in ids:
        tokens = " ".join(tokenizer.convert_ids_to_tokens(with_word))
        raise DataError(f"class word {word!r} does not stand apart from the text before it: {tokens}; {_OTHER_WORD}")
    return ids
