"""Task files: what a user's own task is, in YAML."""

import re
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

from fedhpc.data.generation import COLUMNS, FIELD, TRAINED, GenerationTask
from fedhpc.data.tasks import GENERATION_TASKS, PLACEHOLDER, SPLITS, TASKS, Task
from fedhpc.errors import ConfigError, did_you_mean
from fedhpc.registry import GENERATION_METRICS, METRICS, load_plugins
from fedhpc.yaml_files import YAML_ERRORS, read_texts, text_of


def load_task(name_or_path: str | Path) -> Task | GenerationTask:
    """A built-in task by name, or one described by a YAML file; ConfigError if it is neither."""
    name = str(name_or_path)
    if name in TASKS:
        return TASKS[name]
    if name in GENERATION_TASKS:
        return GENERATION_TASKS[name]
    path = Path(name)
    if not path.is_file():
        known = [*TASKS, *GENERATION_TASKS]
        advice = did_you_mean(name, known)
        raise ConfigError(f"task {name!r} is neither a task file nor one of {', '.join(known)}{advice}")
    try:
        content = read_texts(text_of(path))
    except YAML_ERRORS as error:
        raise ConfigError(f"{path}: not a YAML file: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: a task file is a mapping with the keys {', '.join(_KEYS)}")
    if _well_formed(content.get("plugins"), list):
        load_plugins(content["plugins"])
    kind = content.get("kind", "classification")
    if kind not in KINDS:
        raise ConfigError(f"{path}: kind: {kind!r} is none of {', '.join(KINDS)}{did_you_mean(str(kind), KINDS)}")
    generates = kind == "generation"
    problems = list(_generation_problems(content) if generates else _problems(content))
    if problems:
        raise ConfigError("\n".join(f"{path}: {problem}" for problem in problems))
    if generates:
        return _generation_task(content)
    template = content["template"]
    return Task(
        name=content["task"],
        columns=content["columns"],
        classes=content["classes"],
        encoder_template=template.get("encoder", ""),
        decoder_template=template.get("decoder", ""),
        metric=content.get("metric", "accuracy"),
        splits=SPLITS | _files(content),
    )


def _generation_task(content: dict[str, Any]) -> GenerationTask:
    held_back = _number(content.get("splits", {}).get("validation", ""))
    splits = SPLITS | _files(content)
    return GenerationTask(
        name=content["task"],
        format=content.get("format", "prompt-response"),
        columns=content.get("columns", {}),
        template=content.get("template"),
        chat=content.get("chat") == "true",
        system=content.get("system"),
        device=content.get("device"),
        category=content.get("category"),
        metrics=tuple(content.get("metrics", ())),
        splits=splits if held_back is None else {"train": splits["train"]},
        held_back=held_back,
    )


def _files(content: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    return {split: (file,) for split, file in content.get("splits", {}).items()}


def _number(value: str) -> float | None:
    """A number; None for a file's name."""
    try:
        return float(value)
    except ValueError:
        return None


KINDS = ("classification", "generation")
_KEYS: dict[str, type] = {
    "task": str,
    "kind": str,
    "columns": dict,
    "classes": dict,
    "template": dict,
    "metric": str,
    "splits": dict,
    "plugins": list,
}
_GENERATION_KEYS: dict[str, type] = {
    "task": str,
    "kind": str,
    "format": str,
    "columns": dict,
    "template": str,
    "chat": str,
    "system": str,
    "device": str,
    "category": str,
    "metrics": list,
    "splits": dict,
    "plugins": list,
}
_EXPECTED: dict[type, str] = {str: "text", dict: "a mapping of text to text", list: "a list of names"}
_REQUIRED = ("task", "columns", "classes", "template")


def _problems(content: dict[str, Any]) -> Iterable[str]:
    """Everything that is wrong with a task file."""
    yield from _unknown("", content, _KEYS)
    yield from (f"{key}: missing" for key in _REQUIRED if key not in content)
    sound = yield from _sound(content, _KEYS)
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


def _sound(content: dict[str, Any], keys: dict[str, type]) -> Generator[str, None, dict[str, Any]]:
    """Yields what is malformed; returns all else."""
    malformed = [key for key, kind in keys.items() if key in content and not _well_formed(content[key], kind)]
    for key in malformed:
        yield f"{key}: expected {_EXPECTED[keys[key]]}, none of it empty"
    sound = {key: value for key, value in content.items() if key in keys and key not in malformed}
    yield from (f"{key}: holds half a character" for key, value in sound.items() if not _is_unicode(value))
    return sound


def _generation_problems(content: dict[str, Any]) -> Iterable[str]:
    """Everything that is wrong with a task file of texts to be generated."""
    yield from _unknown("", content, _GENERATION_KEYS)
    if "task" not in content:
        yield "task: missing"
    sound = yield from _sound(content, _GENERATION_KEYS)
    form = sound.get("format", "prompt-response")
    if form not in COLUMNS:
        yield f"format: {form!r} is none of {', '.join(COLUMNS)}{did_you_mean(form, COLUMNS)}"
        return
    if sound.get("chat", "false") not in ("true", "false"):
        yield "chat: expected true or false"
    columns, template = sound.get("columns", {}), sound.get("template")
    if form in ("messages", "text"):
        yield from (f"{key}: not with format: {form}" for key in ("template", "chat") if key in sound)
        template = None
    if template is None:
        yield from _unknown("columns.", columns, COLUMNS[form])
    else:
        yield from _shown_problems(template, COLUMNS[form] | columns, TRAINED[form])
    if "system" in sound and form != "messages" and sound.get("chat") != "true":
        yield "system: needs a chat template: chat: true"
    if form == "text" and "metrics" in sound:
        yield "metrics: not with format: text, whose texts have no response to compare with"
    for name in sound.get("metrics", ()):
        if name not in GENERATION_METRICS:
            advice = did_you_mean(name, GENERATION_METRICS)
            yield f"metrics: {name!r} is none of {', '.join(GENERATION_METRICS)}{advice}"
    splits = sound.get("splits", {})
    yield from _unknown("splits.", splits, SPLITS)
    share = _number(splits.get("validation", ""))
    if share is not None and not 0 < share < 1:
        yield f"splits.validation: {share:g} is no share of the training examples, which is above 0 and below 1"


def _shown_problems(template: str, fields: Iterable[str], trained: str) -> Iterable[str]:
    valid = [name for name in fields if name != trained]
    shown = FIELD.findall(template)
    for name in shown:
        if name not in valid:
            yield f"template: {{{name}}} is none of {', '.join(valid)}{did_you_mean(name, valid)}"
    if not shown:
        yield f"template: shows no field; the columns give {', '.join(f'{{{name}}}' for name in valid)}"


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
            yield f"template.{kind}: {name} is none of {', '.join([slot, *valid])}{did_you_mean(name, valid)}"
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
            yield f"{prefix}{key}: unknown; valid keys are {', '.join(valid)}{did_you_mean(key, valid)}"
