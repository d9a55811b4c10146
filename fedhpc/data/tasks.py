"""Tasks: what the columns, classes and templates of a data set are.

The ten built-in tasks follow the templates of the FedPepTAO release; any other is a small YAML file. A template is
plain text with ``{field}`` for a text column and one answer slot: ``<mask>`` for encoders, ``{word}`` for decoders.
"""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fedhpc.errors import ConfigError
from fedhpc.registry import METRICS, load_plugins
from fedhpc.yaml_files import YAML_ERRORS, read_texts, text_of

Kind = Literal["encoder", "decoder"]
Head = Literal["verbalizer", "linear"]

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
_LABEL_NAMES = ("label_text",)
"""Columns that say by name what the label column numbers; the numbering is that distribution's own."""
FIELD = re.compile(r"\{(\w+)\}")
PLACEHOLDER = re.compile(r"\{\w+\}|<mask>|<sep>")


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
    class_names: dict[str, str] = field(default_factory=dict)
    """Name that other distributions of the same data give a class -> label value."""
    headerless: tuple[str, ...] = ()
    """Columns of the original files, which have no header line."""

    @property
    def fields(self) -> list[str]:
        """The text fields, in the order of the columns."""
        return [name for name in self.columns if name != "label"]

    @property
    def is_built_in(self) -> bool:
        """Whether it is one of TASKS, whatever the name says."""
        return self in TASKS.values()

    def column_names(self, name: str) -> tuple[str, ...]:
        """The source columns that may hold a field, the one to prefer first."""
        column = self.columns[name]
        if not self.is_built_in:
            return (column,)
        return (*(_LABEL_NAMES if name == "label" else ()), column, *_COLUMN_ALIASES.get(column, ()))

    def label(self, name: str) -> str | None:
        """The label value that a source means by a name: that value, another spelling of it, or a class's name."""
        if name in self.classes:
            return name
        alike = [value for value in self.classes if _plain(value) == _plain(name)]
        return alike[0] if len(alike) == 1 else self.class_names.get(_plain(name))

    def template(self, *, kind: Kind, head: Head) -> str:
        """The template for one kind of backbone, or ConfigError; a linear head needs the text alone."""
        if head == "linear":
            return ("<sep>" if kind == "encoder" else " ").join(f"{{{name}}}" for name in self.fields)
        template = self.encoder_template if kind == "encoder" else self.decoder_template
        if not template:
            raise ConfigError(f"task {self.name} has no template.{kind}, which this backbone needs")
        return template


def _plain(name: str) -> str:
    """A class's name without what spellings differ in."""
    return re.sub(r"[\s_-]+", "_", name.strip().lower())


def _single(name: str, classes: dict[str, str], encoder: str = "{a} . It was <mask> .", **more: Any) -> Task:
    return Task(
        name=name,
        columns={"a": "sentence", "label": "label"},
        classes=classes,
        encoder_template=encoder,
        decoder_template="{a} It was {word} .",
        **more,
    )


def _pair(name: str, columns: dict[str, str], classes: dict[str, str], **more: Any) -> Task:
    first, second = [name for name in columns if name != "label"]
    return Task(
        name=name,
        columns=columns,
        classes=classes,
        encoder_template=f"{{{first}}} ? <mask> , {{{second}}}",
        decoder_template=f"{{{first}}} {{{second}}} They are {{word}} .",
        **more,
    )


_SENTIMENT = {"0": "terrible", "1": "great"}
_POLARITY = {"negative": "0", "neg": "0", "positive": "1", "pos": "1"}
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
        _single("sst-2", _SENTIMENT, class_names=_POLARITY),
        _single("mr", _SENTIMENT, class_names=_POLARITY),
        _single("mpqa", _SENTIMENT, class_names=_POLARITY),
        _single(
            "cola",
            {"0": "unacceptable", "1": "acceptable"},
            class_names={"unacceptable": "0", "acceptable": "1"},
            metric="matthews",
            headerless=("source", "label", "star", "sentence"),
        ),
        _single("subj", {"0": "subjective", "1": "objective"}, class_names={"subjective": "0", "objective": "1"}),
        _single("trec", _QUESTION_TYPES, encoder="<mask> : {a}"),
        _pair("rte", {"a": "sentence1", "b": "sentence2", "label": "label"}, _ENTAILMENT),
        _pair("qnli", {"a": "question", "b": "sentence", "label": "label"}, _ENTAILMENT),
        _pair(
            "mrpc",
            {"a": "#1 String", "b": "#2 String", "label": "Quality"},
            {"0": "No", "1": "Yes"},
            class_names={"not_equivalent": "0", "equivalent": "1"},
            metric="accuracy_f1",
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
        content = read_texts(text_of(path))
    except YAML_ERRORS as error:
        raise ConfigError(f"{path}: not a YAML file: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: a task file is a mapping with the keys {', '.join(_KEYS)}")
    if _well_formed(content.get("plugins"), list):
        load_plugins(content["plugins"])
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
    "plugins": list,
}
_EXPECTED: dict[type, str] = {str: "text", dict: "a mapping of text to text", list: "a list of modules"}
_REQUIRED = ("task", "columns", "classes", "template")


def _problems(content: dict[str, Any]) -> Iterable[str]:
    """Everything that is wrong with a task file."""
    yield from _unknown("", content, _KEYS)
    yield from (f"{key}: missing" for key in _REQUIRED if key not in content)
    malformed = [key for key, kind in _KEYS.items() if key in content and not _well_formed(content[key], kind)]
    for key in malformed:
        yield f"{key}: expected {_EXPECTED[_KEYS[key]]}, none of it empty"
    sound = {key: value for key, value in content.items() if key in _KEYS and key not in malformed}
    yield from (f"{key}: holds half a character" for key, value in sound.items() if not _is_unicode(value))
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
        found = [match.group() for match in PLACEHOLDER.finditer(template[kind])]
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
    texts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
    return isinstance(value, kind) and all(isinstance(text, str) and text.strip() for text in texts)


def _is_unicode(value: str | list[str] | dict[str, str]) -> bool:
    """Whether there is no half of a character, which an escape in a YAML file can name."""
    texts = [value] if isinstance(value, str) else [*value, *(value.values() if isinstance(value, dict) else ())]
    return not any("\ud800" <= character <= "\udfff" for text in texts for character in text)


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
    return list(dict.fromkeys(name for name in FIELD.findall(template) if name != "word"))
