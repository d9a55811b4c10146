"""Preparing texts to be generated: records read, rendered, tokenised, and what of them is trained."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import numpy as np
from tqdm import tqdm

from fedhpc.data.generation import GenerationTask, Rendered, Renderer
from fedhpc.data.generation_tokens import BATCH, Example, GenerationEncoder
from fedhpc.data.prepared import Description, Split, tokenizer_fingerprint, write_prepared
from fedhpc.data.readers import Record
from fedhpc.data.recipe import Recipe, TargetModel, pad_id_of, setting
from fedhpc.data.sources import Records, read_records
from fedhpc.data.tokens import check_known
from fedhpc.errors import DataError, ModelError
from fedhpc.seeding import generator

SHOWN = 2
"""Examples shown before anything is written."""
TRAINED, PLAIN = "\x1b[1;32m", "\x1b[0m"
MARKS = "[[", "]]"
"""Around what is trained, where there are no colours."""


@dataclass(frozen=True, kw_only=True)
class Texts:
    """The examples of one split as text."""

    unit: str
    numbers: Sequence[int]
    rendered: list[Rendered]
    devices: list[str]
    categories: list[str]


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What became of a split's examples."""

    cut: int
    dropped: int


def prepare_generation(
    recipe: Recipe, task: GenerationTask, model: TargetModel, show: Callable[[str], None], *, colours: bool
) -> str:
    """Do all of it; returns the closing summary.

    Args:
        show: is given two examples as text, before anything is written.
        colours: whether what is trained has a colour in them.

    Raises:
        UserError: what cannot be prepared so.
    """
    if model.kind != "decoder":
        raise ModelError(
            f"model {recipe.model!r} is an encoder, which generates no text; task {task.name} needs a decoder"
        )
    renderer = Renderer(task, model.tokenizer)
    encoder = GenerationEncoder(
        model.tokenizer, chat=renderer.is_chat, max_length=recipe.max_length, overlong=recipe.overlong
    )
    found = {name: _read(task, renderer, records) for name, records in _records(task, recipe).items()}
    if task.held_back is not None:
        found = _divided(found["train"], task.held_back, recipe.seed)
    found["train"] = _limited(found["train"], recipe.limit_train, recipe.seed)
    show("\n\n".join(shown(each, colours=colours) for each in found["train"].rendered[:SHOWN]))
    devices = list(dict.fromkeys(name for texts in found.values() for name in texts.devices))
    categories = list(dict.fromkeys(name for texts in found.values() for name in texts.categories))
    splits, counts = {}, {}
    for name, texts in found.items():
        splits[name], counts[name] = _tokenised(texts, encoder, model, devices, categories, name)
    facts = {
        "task": task.name,
        "head": "language_model",
        "kind": model.kind,
        "model": recipe.model,
        "tokenizer_sha256": tokenizer_fingerprint(model.tokenizer),
        "pad_id": pad_id_of(model),
        "max_length": recipe.max_length,
        "template": "chat" if renderer.is_chat else task.template or task.format,
        "class_names": categories,
        "class_words": [],
        "word_ids": [],
        "metric": "perplexity",
        "selected": recipe.selected,
        "generation": {
            **{key: getattr(task, key) for key in ("format", "columns", "template", "chat", "system")},
            "metrics": list(task.metrics),
            "devices": devices,
            "overlong": recipe.overlong,
            "chat_template": model.tokenizer.chat_template if renderer.is_chat else None,
        },
    }
    return summary(write_prepared(recipe.out, facts, splits), splits, counts, recipe.out)


def _records(task: GenerationTask, recipe: Recipe) -> dict[str, Records]:
    files = recipe.files(task)
    if task.held_back is not None:
        files = {"train": files["train"]}
    return read_records(recipe.source, files)


def _read(task: GenerationTask, renderer: Renderer, records: Records) -> Texts:
    unit, first, each, _ = records
    rendered: list[Rendered] = []
    devices: list[str] = []
    categories: list[str] = []
    try:
        for record in each:
            if not rendered:
                _check_columns(task, record)
            rendered.append(renderer(record))
            for column, values in ((task.device, devices), (task.category, categories)):
                if column is not None:
                    values.append(_name(record.get(column), column))
    except ValueError as error:
        raise DataError(f"{unit} {first + len(rendered)}: {error}") from None
    if not rendered:
        raise DataError(f"{unit.rpartition(' ')[0]} holds no examples")
    numbers = range(first, first + len(rendered))
    return Texts(unit=unit, numbers=numbers, rendered=rendered, devices=devices, categories=categories)


def _check_columns(task: GenerationTask, record: Record) -> None:
    for column in task.needed_columns:
        if column not in record:
            near = get_close_matches(column, list(record), n=1, cutoff=0.5)
            advice = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(
                f"no column {column!r}, which task {task.name} needs; there are {', '.join(record)}{advice}"
            )


def _name(value: Any, column: str) -> str:
    """The name of a device or a category."""
    if isinstance(value, bool | int | str) and str(value).strip():
        return str(value)
    raise ValueError(f"column {column!r} holds {value!r}, expected the name or number of a group")


def _chosen(texts: Texts, places: Sequence[int] | np.ndarray) -> Texts:
    def some(values: Sequence[Any]) -> list[Any]:
        return [values[place] for place in places] if values else []

    return Texts(
        unit=texts.unit,
        numbers=some(texts.numbers),
        rendered=some(texts.rendered),
        devices=some(texts.devices),
        categories=some(texts.categories),
    )


def _divided(texts: Texts, share: float, seed: int) -> dict[str, Texts]:
    """A training and a validation split of one, each in the order of the source."""
    total = len(texts.rendered)
    size = min(max(1, round(share * total)), total - 1)
    if size < 1:
        raise DataError(f"{texts.unit.rpartition(' ')[0]} holds {total} example, which cannot be divided")
    order = generator(seed, purpose="validation split").permutation(total)
    return {"train": _chosen(texts, np.sort(order[size:])), "validation": _chosen(texts, np.sort(order[:size]))}


def _limited(texts: Texts, count: int | None, seed: int) -> Texts:
    total = len(texts.rendered)
    if count is None or count >= total:
        return texts
    return _chosen(texts, np.sort(generator(seed, purpose="limit-train").choice(total, count, replace=False)))


def _tokenised(
    texts: Texts,
    encoder: GenerationEncoder,
    model: TargetModel,
    devices: list[str],
    categories: list[str],
    title: str,
) -> tuple[Split, Counts]:
    kept: list[int] = []
    ids: list[np.ndarray] = []
    spans: list[np.ndarray] = []
    cut = place = offset = 0
    bar = tqdm(_encoded(texts, encoder), total=len(texts.rendered), desc=title, unit=" ex", disable=None)
    for place, example in enumerate(bar):
        if example is None:
            continue
        own = np.array(example.ids, np.int32)
        check_known(f"{texts.unit} {texts.numbers[place]}", [int(own.max())], model.tokenizer, model.vocabulary_size)
        kept.append(place)
        ids.append(own)
        spans.append(np.array(example.spans, np.int64).ravel() + offset)
        offset += len(own)
        cut += example.cut
    if not kept:
        raise DataError(
            f"{texts.unit.rpartition(' ')[0]}: no example is left within --max-length; give a larger one, or "
            "--overlong cut-response"
        )
    of_device = {name: number for number, name in enumerate(devices)}
    of_category = {name: number for number, name in enumerate(categories)}
    lengths = np.array([len(own) for own in ids])
    split = Split(
        tokens=np.concatenate(ids),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        labels=np.array([of_category[texts.categories[k]] if categories else 0 for k in kept], np.int32),
        slots=lengths - 1,
        pad_id=pad_id_of(model),
        spans=np.concatenate(spans),
        devices=np.array([of_device[texts.devices[k]] if devices else 0 for k in kept], np.int32),
    )
    return split, Counts(cut=cut, dropped=len(texts.rendered) - len(kept))


def _encoded(texts: Texts, encoder: GenerationEncoder) -> Iterator[Example | None]:
    for first in range(0, len(texts.rendered), BATCH):
        yield from encoder(texts.rendered[first : first + BATCH])


def shown(example: Rendered, *, colours: bool) -> str:
    """An example's text, what is trained in colour or between marks."""
    before, behind = (TRAINED, PLAIN) if colours else MARKS
    text, place = "", 0
    for begin, end in example.trained:
        text += f"{example.text[place:begin]}{before}{example.text[begin:end]}{behind}"
        place = end
    return text + example.text[place:]


def summary(description: Description, splits: Mapping[str, Split], counts: Mapping[str, Counts], out: str) -> str:
    """What was made, where it is, and what to do next."""
    table = [["split", "examples", "tokens", "trained", "median", "longest", "cut", "dropped"]]
    for name, split in splits.items():
        facts, what = description.splits[name], counts[name]
        numbers = (facts["examples"], facts["tokens"], facts["trained_tokens"], int(np.median(split.lengths)))
        table.append([name, *map(str, (*numbers, facts["longest"], what.cut, what.dropped))])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in table]
    devices, categories = description.generation["devices"], description.class_names
    groups = [f"{len(names)} {what}" for names, what in ((devices, "devices"), (categories, "categories")) if names]
    keys = [setting("data.task", description.task), setting("data.path", out), "tuning.head=language_model"]
    return "\n".join(
        [
            f"{description.task} for {description.model}: texts to be generated",
            *lines,
            *([f"the data name {' and '.join(groups)}"] if groups else []),
            f"written to {out}; next:",
            f"  fedhpc run CONFIG.yaml {' '.join(f'--set {key}' for key in keys)}",
        ]
    )
