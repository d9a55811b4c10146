"""Tasks: what the columns, classes and templates of a data set are.

The ten built-in tasks follow the templates of the FedPepTAO release; any other is a small YAML file. A template is
plain text with ``{field}`` for a text column and one answer slot: ``<mask>`` for encoders, ``{word}`` for decoders.
"""

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from fedhpc.data.generation import GenerationTask
from fedhpc.errors import ConfigError

Kind = Literal["encoder", "decoder"]
Head = Literal["verbalizer", "linear"]

ENDINGS = (".tsv", ".jsonl", ".csv", ".parquet")
SPLITS = {
    split: tuple(f"{name}{end}" for end in ENDINGS for name in names)
    for split, names in (("train", ("train",)), ("validation", ("dev", "validation", "val")))
}
"""Split -> file names to look for."""
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


GENERATION_TASKS: dict[str, GenerationTask] = {
    task.name: task
    for task in (
        GenerationTask(name="alpaca", format="alpaca", splits={"train": SPLITS["train"]}, held_back=0.02),
        GenerationTask(
            name="dolly",
            format="alpaca",
            columns={"input": "context", "response": "response"},
            category="category",
            splits={"train": SPLITS["train"]},
            held_back=0.05,
        ),
    )
}


def template_fields(template: str) -> list[str]:
    """The text fields that a template shows, in its order."""
    return list(dict.fromkeys(name for name in FIELD.findall(template) if name != "word"))
