"""Preparing texts to be generated: records read, rendered, tokenised, and what of them is trained."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from fedhpc.data.generation import GenerationTask, Rendered, Renderer
from fedhpc.data.generation_tokens import Example, GenerationEncoder
from fedhpc.data.prepared import Split, tokenizer_fingerprint, write_prepared
from fedhpc.data.readers import Record, Records, text_value
from fedhpc.data.recipe import Recipe, TargetModel, pad_id_of, setting
from fedhpc.data.sources import read_records
from fedhpc.data.texts import BATCH
from fedhpc.data.tokens import check_known
from fedhpc.errors import DataError, ModelError, did_you_mean
from fedhpc.seeding import generator

SHOWN = 2
"""Examples shown before anything is written."""
SHOWN_PIECES, SHOWN_CHARACTERS = 8, 400
"""Pieces of each, trained or not, and characters of a piece."""
TRAINED, PLAIN = "\x1b[1;32m", "\x1b[0m"
MARKS = "[[", "]]"
"""Around what is trained, where there are no colours."""


class Text(NamedTuple):
    """An example as text."""

    place: str
    """Where it stands in the source."""
    rendered: Rendered
    device: str
    category: str


class Encoded(NamedTuple):
    """A split as tokens."""

    texts: list[Text]
    """Of its examples."""
    examples: list[Example]
    dropped: int
    """Examples that are too long."""


def prepare_generation(
    recipe: Recipe, task: GenerationTask, model: TargetModel, show: Callable[[str], None], *, colours: bool
) -> str:
    """Do all of it; returns what to do next.

    Args:
        show: is given a table of the splits and two examples, before anything is written.
        colours: whether what is trained has a colour in them.

    Raises:
        UserError: what cannot be prepared so.
    """
    facts = describe(recipe, task, model)
    renderer = Renderer(task, model.tokenizer)
    encoded = encode_splits(read_splits(task, renderer, recipe), renderer, recipe, model)
    every = [text for split in encoded.values() for text in split.texts]
    devices = list(dict.fromkeys(text.device for text in every)) if task.device else []
    categories = list(dict.fromkeys(text.category for text in every)) if task.category else []
    splits = {name: _split(split, devices, categories, facts["pad_id"]) for name, split in encoded.items()}
    groups = [f"{len(names)} {what}" for names, what in ((devices, "devices"), (categories, "categories")) if names]
    shown = [shown_example(each, model.tokenizer, colours=colours) for each in encoded["train"].examples[:SHOWN]]
    lines = [
        f"{task.name} for {recipe.model}: texts to be generated",
        *_table(encoded, splits),
        *([f"the data name {' and '.join(groups)}"] if groups else []),
        *(f"\nexample {number}:\n{text}" for number, text in enumerate(shown, 1)),
    ]
    show("\n".join(lines) + "\n")
    facts = facts | {"class_names": categories, "generation": facts["generation"] | {"devices": devices}}
    write_prepared(recipe.out, facts, splits)
    keys = [setting("data.task", task.name), setting("data.path", recipe.out), "tuning.head=language_model"]
    return f"written to {recipe.out}; next:\n  fedhpc run CONFIG.yaml {' '.join(f'--set {key}' for key in keys)}"


def describe(recipe: Recipe, task: GenerationTask, model: TargetModel) -> dict[str, Any]:
    """What the prepared data's description says that does not follow from the source.

    Raises:
        UserError: the task cannot be put to this model.
    """
    if model.kind != "decoder":
        raise ModelError(
            f"model {recipe.model!r} is an encoder, which generates no text; task {task.name} needs a decoder"
        )
    renderer = Renderer(task, model.tokenizer)
    held_back = _held_back(task, recipe)
    return {
        "task": task.name,
        "head": "language_model",
        "kind": model.kind,
        "model": recipe.model,
        "tokenizer_sha256": tokenizer_fingerprint(model.tokenizer),
        "pad_id": pad_id_of(model),
        "max_length": recipe.max_length,
        "template": "chat" if renderer.is_chat else task.template or task.format,
        "class_words": [],
        "word_ids": [],
        "metric": "perplexity",
        "selected": recipe.selected | ({} if held_back is None else {"seed": recipe.seed}),
        "generation": {
            **{key: getattr(task, key) for key in ("format", "columns", "template", "chat", "system")},
            **{key: getattr(task, key) for key in ("device", "category")},
            "metrics": list(task.metrics),
            "held_back": held_back,
            "overlong": recipe.overlong or "cut-prompt",
            "chat_template": renderer.template or None,
        },
    }


def _held_back(task: GenerationTask, recipe: Recipe) -> float | None:
    """The share of the training examples that validates; None where the source has a split for it."""
    return None if "validation" in recipe.files(task) else task.held_back


def read_splits(task: GenerationTask, renderer: Renderer, recipe: Recipe) -> dict[str, list[Text]]:
    """The examples of both splits, as many as are wanted, in the order of the source.

    Raises:
        DataError: with its place, for the first that cannot be used.
    """
    found = {
        name: list(_texts(task, renderer, records))
        for name, records in read_records(recipe.source, recipe.files(task)).items()
    }
    train = found["train"]
    if (share := _held_back(task, recipe)) is not None:
        size = min(max(1, round(share * len(train))), len(train) - 1)
        if size < 1:
            raise DataError(f"{train[0].place} is the only example; two splits need two")
        order = generator(recipe.seed, purpose="validation split").permutation(len(train))
        found = {"train": _chosen(train, order[size:]), "validation": _chosen(train, order[:size])}
    if recipe.limit_train is not None and recipe.limit_train < len(found["train"]):
        drawn = generator(recipe.seed, purpose="limit-train")
        found["train"] = _chosen(found["train"], drawn.choice(len(found["train"]), recipe.limit_train, replace=False))
    return found


def _chosen(texts: list[Text], places: np.ndarray) -> list[Text]:
    return [texts[place] for place in np.sort(places)]


def _texts(task: GenerationTask, renderer: Renderer, records: Records) -> Iterator[Text]:
    done = 0
    try:
        for record in records.each:
            if not done:
                _check_columns(task, record)
            device, category = (column and _name(record.get(column), column) for column in (task.device, task.category))
            yield Text(records.place(done), renderer(record), device or "", category or "")
            done += 1
    except ValueError as error:
        raise DataError(f"{records.place(done)}: {error}") from None
    if not done:
        raise DataError(f"{records.source} holds no examples")


def _check_columns(task: GenerationTask, record: Record) -> None:
    for column in task.needed_columns:
        if column not in record:
            advice = did_you_mean(column, record)
            raise ValueError(
                f"no column {column!r}, which task {task.name} needs; there are {', '.join(record)}{advice}"
            )


def _name(value: Any, column: str) -> str:
    """The name of a device or a category."""
    if isinstance(value, bool | int):
        return str(value)
    if isinstance(value, str) and value.strip():
        return text_value(value, column)
    raise ValueError(f"column {column!r} holds {value!r}, expected the name or number of a group")


def encode_splits(
    splits: Mapping[str, list[Text]], renderer: Renderer, recipe: Recipe, model: TargetModel
) -> dict[str, Encoded]:
    """The examples of both splits as tokens, those that are too long shortened or left out.

    Raises:
        DataError: with its place, for one that the tokenizer or the model cannot read; or none is left.
    """
    encoder = GenerationEncoder(
        model.tokenizer, chat=renderer.is_chat, max_length=recipe.max_length, overlong=recipe.overlong or "cut-prompt"
    )
    return {name: _encode(texts, encoder, model, name) for name, texts in splits.items()}


def _encode(texts: list[Text], encoder: GenerationEncoder, model: TargetModel, title: str) -> Encoded:
    kept: list[tuple[Text, Example]] = []
    bar = tqdm(_examples(texts, encoder), total=len(texts), desc=title, unit=" ex", disable=None)
    for text, example in zip(texts, bar, strict=True):
        if example is None:
            continue
        if not example.spans:
            raise DataError(f"{text.place}: no token to train: nothing predicts the first one")
        check_known(text.place, [max(example.ids)], model.tokenizer, model.vocabulary_size)
        kept.append((text, example))
    if not kept:
        raise DataError(
            f"all {len(texts)} examples of split {title} are too long, as {texts[0].place}; give a larger "
            "--max-length, or another --overlong"
        )
    return Encoded([text for text, _ in kept], [example for _, example in kept], len(texts) - len(kept))


def _examples(texts: Sequence[Text], encoder: GenerationEncoder) -> Iterator[Example | None]:
    for first in range(0, len(texts), BATCH):
        batch = texts[first : first + BATCH]
        try:
            yield from encoder([text.rendered for text in batch])
        except DataError:
            for text in batch:
                try:
                    list(encoder([text.rendered]))
                except DataError as error:
                    raise DataError(f"{text.place}: {error}") from None
            raise


def _split(encoded: Encoded, devices: Sequence[str], categories: Sequence[str], pad_id: int) -> Split:
    of_device, of_category = ({name: number for number, name in enumerate(names)} for names in (devices, categories))
    lengths = np.array([len(example.ids) for example in encoded.examples])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    spans = [np.ravel(example.spans) + start for example, start in zip(encoded.examples, offsets[:-1], strict=True)]
    return Split(
        tokens=np.concatenate([np.array(example.ids, np.int32) for example in encoded.examples]),
        offsets=offsets,
        labels=np.array([of_category.get(text.category, 0) for text in encoded.texts], np.int32),
        slots=lengths - 1,
        pad_id=pad_id,
        spans=np.concatenate(spans),
        devices=np.array([of_device.get(text.device, 0) for text in encoded.texts], np.int32),
    )


def _table(encoded: Mapping[str, Encoded], splits: Mapping[str, Split]) -> list[str]:
    """Counts of examples and tokens; `cut` are examples that lost some tokens, `dropped` those that were left out."""
    table = [["split", "examples", "tokens", "trained", "median", "longest", "cut", "dropped"]]
    for name, split in splits.items():
        numbers = (len(split), len(split.tokens), split.num_terms.sum(), int(np.median(split.lengths)))
        cut = sum(example.cut for example in encoded[name].examples)
        table.append([name, *map(str, (*numbers, split.lengths.max(), cut, encoded[name].dropped))])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in table]


def shown_example(example: Example, tokenizer: Any, *, colours: bool) -> str:
    """An example's tokens as text, what is trained in colour or between marks, long pieces without their middle."""
    before, behind = (TRAINED, PLAIN) if colours else MARKS
    bounds = sorted({0, *(bound for span in example.spans for bound in span), len(example.ids)})
    # What a token is as text may depend on those before it.
    ends = [len(tokenizer.decode(example.ids[:bound], clean_up_tokenization_spaces=False)) for bound in bounds]
    text = tokenizer.decode(example.ids, clean_up_tokenization_spaces=False)
    pieces = []
    for start, first, last in zip(bounds, ends, ends[1:], strict=False):
        piece = _shortened(text[first:last])
        pieces.append(f"{before}{piece}{behind}" if any(start == begin for begin, _ in example.spans) else piece)
    more = len(pieces) - SHOWN_PIECES
    return "".join(pieces[:SHOWN_PIECES]) + (f" ... and {more} more pieces" if more > 0 else "")


def _shortened(text: str) -> str:
    """A text as it can be printed, without its middle where it is long."""
    left_out = len(text) - SHOWN_CHARACTERS
    if left_out > 0:
        half = SHOWN_CHARACTERS // 2
        text = f"{text[:half]} ... {left_out} characters ... {text[-half:]}"
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)
