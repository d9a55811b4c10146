"""Preparing data: a labelled text data set, its template applied, tokenised for one model.

The source is a folder with the task's original files (TSV, unquoted, or JSON lines), a folder written by
``datasets.save_to_disk``, or a data set of the Hugging Face hub (``OWNER/NAME`` or ``OWNER/NAME:CONFIGURATION``).
"""

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from fedhpc.data.prepared import Description, Split, check_writable, tokenizer_fingerprint, write_prepared
from fedhpc.data.readers import Record, read_table
from fedhpc.data.tasks import SPLITS, Head, Kind, Task, load_task, template_fields
from fedhpc.data.texts import Texts, encode, text_fields
from fedhpc.data.tokens import TextEncoder, check_known, find_word_ids
from fedhpc.errors import DataError, ModelError
from fedhpc.seeding import generator
from fedhpc.yaml_files import YAML_ERRORS, read_value

PICKLE_SUFFIXES = {".pkl", ".pickle", ".pt", ".pth", ".bin", ".joblib", ".npy", ".npz"}
PICKLE_STARTS = (*(bytes([0x80, protocol]) for protocol in range(2, 6)), b"PK\x03\x04", b"\x93NUMPY")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to prepare, from what and for which model."""

    task: str
    """One of TASKS, or a task file."""
    source: str
    model: str
    """Folder or hub name of the backbone."""
    out: str
    """The folder to write; an earlier prepared one is replaced."""
    head: Head = "verbalizer"
    max_length: int = 128
    """Tokens of the longest example."""
    limit_train: int | None = None
    """So many random training examples."""
    seed: int = 42
    """Seed of the choice that ``limit_train`` makes."""
    validation: str | None = None
    """The source's split that devices are evaluated on; the task's own names unless given."""

    @property
    def selected(self) -> dict[str, Any]:
        """Which of the source's examples are taken, as the description records it."""
        return {
            "limit_train": self.limit_train,
            "seed": None if self.limit_train is None else self.seed,
            "validation": self.validation,
        }

    def files(self, task: Task) -> dict[str, tuple[str, ...]]:
        """Split -> file names to look for."""
        own = {"validation": tuple(f"{self.validation}{end}" for end in (".tsv", ".jsonl"))} if self.validation else {}
        return task.splits | own


@dataclass(frozen=True, kw_only=True)
class Examples:
    """The examples of one split, read and checked."""

    texts: Texts
    labels: list[int]


@dataclass(frozen=True, kw_only=True)
class TargetModel:
    """What tokenising for a model needs to know of it."""

    tokenizer: Any
    kind: Kind
    can_score_words: bool
    vocabulary_size: int


def read_source(task: Task, source: str, files: Mapping[str, Sequence[str]]) -> dict[str, Examples]:
    """Read and check both splits of a source of any form; DataError for what cannot be read.

    Args:
        files: split -> file names to look for.
    """
    found = find_source(source, files)
    if found is None:
        return _read_datasets(task, source, _load_datasets(str(Path(source).expanduser())), files)
    return {split: _read_file(task, file) for split, file in found.items()}


def find_source(source: str, files: Mapping[str, Sequence[str]]) -> dict[str, Path] | None:
    """The files of both splits; None where the datasets library has to read the source.

    Raises:
        DataError: there is no such folder and this is no hub's name, a split is missing or may be pickled, or there is
            no such library.
    """
    path = Path(source).expanduser()
    if path.is_file():
        refuse_pickle(path)
        names = " and ".join(" or ".join(names) for names in files.values())
        raise DataError(f"{path} is a file; give the folder that holds {names}")
    is_saved = any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))
    if path.is_dir() and not is_saved:
        split_files = {split: _find(path, split, files[split]) for split in SPLITS}
        for file in split_files.values():
            refuse_pickle(file)
        return split_files
    is_path = "/" in source and Path(source.partition("/")[0]).is_dir()
    if not path.is_dir() and (is_path or not HUB_ID.fullmatch(source)):
        raise DataError(
            f"{source!r}: there is no folder {path.absolute()}, and a data set of the hub is named OWNER/NAME or "
            "OWNER/NAME:CONFIGURATION"
        )
    if find_spec("datasets") is None:
        found = "a folder of save_to_disk; to read it" if path.is_dir() else "no folder; to ask the hub for it"
        raise DataError(f"{source!r} is {found}, install the datasets library: pip install datasets")
    return None


def _find(folder: Path, split: str, names: Sequence[str]) -> Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    for file in filter(Path.is_file, sorted(folder.iterdir())):
        refuse_pickle(file)
    raise DataError(f"{folder} has no {split} split: looked for {', '.join(names)}")


def refuse_pickle(file: Path) -> None:
    """DataError for a file that reading could make run code, known by its name or by its first bytes."""
    with file.open("rb") as stream:
        start = stream.read(8)
    if file.suffix.lower() in PICKLE_SUFFIXES or start.startswith(PICKLE_STARTS):
        raise DataError(
            f"{file} may hold pickled objects, and reading those can run code hidden in them; "
            "give the data as TSV, JSON lines, or a folder written by datasets.save_to_disk"
        )


def _read_file(task: Task, file: Path) -> Examples:
    records, first_line = read_table(file, headerless=task.headerless, labels=task.classes)
    return _rows(task, f"{file} line", records, first=first_line)


def _load_datasets(source: str) -> Any:
    name, _, configuration = source.partition(":")
    family, _, member = name.partition("/")
    if family in ("glue", "super_glue"):
        name, configuration = family, member or configuration
    try:
        import datasets

        if Path(source).is_dir():
            return datasets.load_from_disk(source)
        return datasets.load_dataset(name, configuration or None)
    except Exception as error:  # the library has no common base for what a data set or a connection can do wrong
        tried = "be read as a folder of save_to_disk" if Path(source).is_dir() else "be found here or on the hub"
        reason = str(error).strip().split("\n")[0]
        raise DataError(
            f"{source!r} could not {tried} ({type(error).__name__}: {reason}); give a folder with the original files, "
            "or one written by datasets.save_to_disk on a machine with a connection"
        ) from error


def _read_datasets(task: Task, source: str, dataset: Any, files: Mapping[str, Sequence[str]]) -> dict[str, Examples]:
    if not isinstance(dataset, dict):
        raise DataError(f"{source} is a single split; save a DatasetDict with train and validation")
    rows = {}
    for split in SPLITS:
        names = dict.fromkeys(name.split(".")[0] for name in files[split])
        found = next((name for name in names if name in dataset), None)
        if found is None:
            raise DataError(f"{source} has no {split} split: looked for {', '.join(names)}, has {', '.join(dataset)}")
        examples = dataset[found].with_format(None)
        rows[split] = _rows(task, f"{source} {found} row", examples, first=0, features=examples.features)
    return rows


def _rows(
    task: Task, unit: str, records: Iterable[Record], *, first: int, features: Mapping[str, Any] | None = None
) -> Examples:
    rows, labels = [], []
    places = {value: place for place, value in enumerate(task.classes)}
    columns: dict[str, str] = {}
    try:
        for record in records:
            columns = columns or {name: _resolve(task, name, list(record)) for name in task.columns}
            column = columns["label"]
            labels.append(places[_label(task, record.get(column), column, features and features[column])])
            rows.append(text_fields(record, {name: columns[name] for name in task.fields}))
    except ValueError as error:
        raise DataError(f"{unit} {first + len(rows)}: {error}") from error
    if not rows:
        raise DataError(f"{unit.rpartition(' ')[0]} holds no examples")
    return Examples(texts=Texts(unit=unit, numbers=range(first, first + len(rows)), rows=rows), labels=labels)


def _resolve(task: Task, field: str, available: list[str]) -> str:
    for name in task.column_names(field):
        if name in available:
            return name
    wanted = task.columns[field]
    raise ValueError(f"no column {wanted!r}, which task {task.name} needs; there are {', '.join(available)}")


def _label(task: Task, value: Any, column: str, feature: Any) -> str:
    """A label as the task writes it; numbered classes that have names count by these. ValueError for any other."""
    if not isinstance(value, str | int | float | None):
        raise ValueError(f"column {column!r} holds a {type(value).__name__}, expected a label")
    name, names = "" if value is None else str(value), getattr(feature, "names", ())
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(names):
        # The author of a task file that knows none of the names has written numbers.
        by_number = not task.is_built_in and not any(task.label(other) or other.isdigit() for other in names)
        name = name if by_number else names[value]
    label = task.label(name)
    if label is None:
        problem = f"unknown label {name!r}" if name else f"no label in column {column!r}"
        valid = ", ".join(task.classes) + (f"; or by name {', '.join(task.class_names)}" if task.class_names else "")
        raise ValueError(f"{problem}; valid are {valid}")
    return label


def load_target_model(name: str) -> TargetModel:
    """A model's tokenizer and what its configuration says, without its weights, or ModelError."""
    from transformers import AutoConfig, AutoTokenizer

    from fedhpc.data.tokenizer_files import tokenizer_advice

    try:
        Path(name, "config.json").exists()  # of a folder that is closed to us, transformers says that it is empty
        config = AutoConfig.from_pretrained(name)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # tokenizers has no class of its own for a file that it does not understand
        looked = f"a folder {Path(name).absolute()} with config.json and tokenizer files, then the Hugging Face hub"
        reason = tokenizer_advice(name) or str(error).strip().split("\n")[0]
        raise ModelError(f"model {name!r} cannot be read; looked for {looked} ({reason})") from error
    if not tokenizer.is_fast or len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise ModelError(f"model {name!r} comes without a usable tokenizer: its folder needs a tokenizer.json")
    kind, has_word_head = model_kind(config)
    return TargetModel(
        tokenizer=tokenizer,
        kind=kind,
        can_score_words=has_word_head and (kind == "decoder" or tokenizer.mask_token is not None),
        vocabulary_size=config.get_text_config().vocab_size,
    )


def model_kind(config: Any) -> tuple[Kind, bool]:
    """Encoder or decoder, and whether the model comes with a head that predicts words; ModelError if neither."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    if config.is_encoder_decoder:
        raise ModelError(f"{config.model_type} is an encoder-decoder model; only encoders and decoders can be tuned")
    architectures = set(config.architectures or ())
    if architectures & set(CAUSAL.values()):
        return "decoder", True
    # ELECTRA is pre-trained to tell tokens that were replaced; only its generator predicts words.
    with_head = {name for name in architectures if name.endswith(("ForMaskedLM", "ForPreTraining"))}
    has_head = not architectures or bool(with_head - {"ElectraForPreTraining"})
    if config.model_type in MASKED:
        return "encoder", has_head
    if config.model_type in CAUSAL:
        return "decoder", has_head
    raise ModelError(f"{config.model_type} is no kind of language model that transformers knows")


def limit(given: Examples, count: int | None, seed: int) -> Examples:
    """A random choice of so many examples, in their order in the source."""
    if count is None or count >= len(given.labels):
        return given
    chosen = np.sort(generator(seed, purpose="limit-train").choice(len(given.labels), count, replace=False))
    numbers, rows = ([part[index] for index in chosen] for part in (given.texts.numbers, given.texts.rows))
    labels = [given.labels[index] for index in chosen]
    return Examples(texts=Texts(unit=given.texts.unit, numbers=numbers, rows=rows), labels=labels)


def tokenise(given: Examples, encoder: TextEncoder, vocabulary_size: int, pad_id: int, title: str) -> tuple[Split, int]:
    """Tokenise one split; also tells how many examples were shortened."""
    encoded: list[tuple[np.ndarray, int]] = []
    num_shortened = 0
    examples = encode(given.texts.rows, given.texts.place, encoder, vocabulary_size)
    for example in tqdm(examples, total=len(given.labels), desc=title, unit=" ex", disable=None):
        ids = np.array(example.ids, np.int32)  # the list is ten times as large
        encoded.append((ids, example.slot))
        num_shortened += example.truncated
    return Split.of(encoded, given.labels, pad_id=pad_id), num_shortened


def prepare(recipe: Recipe) -> str:
    """Do all of it; returns the closing summary."""
    check_writable(recipe.out)
    task, model = load_task(recipe.task), load_target_model(recipe.model)
    facts = description_of(recipe, task, model)
    template, tokenizer = facts["template"], model.tokenizer
    source = read_source(task, recipe.source, recipe.files(task))
    for given in source.values():
        given.texts.check_blank(template_fields(template))
    source["train"] = limit(source["train"], recipe.limit_train, recipe.seed)

    encoder = TextEncoder(template, tokenizer, kind=model.kind, max_length=recipe.max_length)
    size, pad_id = model.vocabulary_size, facts["pad_id"]
    encoded = {name: tokenise(given, encoder, size, pad_id, name) for name, given in source.items()}
    description = write_prepared(recipe.out, facts, {name: split for name, (split, _) in encoded.items()})
    return summary(description, encoded, recipe.out)


def description_of(recipe: Recipe, task: Task, model: TargetModel) -> dict[str, Any]:
    """What the prepared data's description says that does not follow from the source.

    Raises:
        UserError: the task cannot be put to this model.
    """
    template = task.template(kind=model.kind, head=recipe.head)
    word_ids: list[list[int]] = [[] for _ in task.classes]
    if recipe.head == "verbalizer":
        if not model.can_score_words:
            raise ModelError(f"model {recipe.model!r} has no language-model head to score words; use --head linear")
        word_ids = find_word_ids(list(task.classes.values()), template, model.tokenizer, kind=model.kind)
        for word, ids in zip(task.classes.values(), word_ids, strict=True):
            check_known(f"class word {word!r}", ids, model.tokenizer, model.vocabulary_size)
    usual = (model.tokenizer.pad_token_id, model.tokenizer.eos_token_id)  # a model may know neither
    return {
        "task": task.name,
        "head": recipe.head,
        "kind": model.kind,
        "model": recipe.model,
        "tokenizer_sha256": tokenizer_fingerprint(model.tokenizer),
        "pad_id": next((i for i in usual if i is not None and i < model.vocabulary_size), 0),
        "max_length": recipe.max_length,
        "template": template,
        "class_names": list(task.classes),
        "class_words": list(task.classes.values()),
        "word_ids": word_ids,
        "metric": task.metric,
        "selected": recipe.selected,
    }


def summary(description: Description, encoded: Mapping[str, tuple[Split, int]], out: str) -> str:
    """What was made, where it is, and what to do next."""
    header = ["split", "examples", *description.class_names, "median", "longest", "shortened"]
    table = [header]
    for name, (split, num_shortened) in encoded.items():
        facts = description.splits[name]
        numbers = [facts["examples"], *facts["class_counts"], int(np.median(split.lengths)), facts["longest"]]
        table.append([name, *map(str, numbers), str(num_shortened)])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in table]
    named, placed = _setting("data.task", description.task), _setting("data.path", out)
    words = zip(description.class_names, description.class_words, description.word_ids, strict=True)
    answers = ", ".join(f"{name} = {word!r} {ids}" for name, word, ids in words)
    return "\n".join(
        [
            f"{description.task} for {description.kind} {description.model}, {description.head} head",
            *lines,
            f"template: {description.template}",
            *([f"answers: {answers}"] if description.head == "verbalizer" else []),
            f"written to {out}; next:",
            f"  fedhpc run CONFIG.yaml --set {named} --set {placed}",
        ]
    )


def _setting(key: str, value: str) -> str:
    """`KEY=VALUE` for the shell, with the value in quotes where YAML would read it as something else than a text."""
    try:
        is_plain = value.isprintable() and read_value(value) == value
    except YAML_ERRORS:
        is_plain = False
    if not is_plain:
        shown = value.replace("\\", r"\\").replace('"', r"\"")
        value = '"' + "".join(c if c.isprintable() else rf"\U{ord(c):08x}" for c in shown) + '"'
    return shlex.quote(f"{key}={value}")
