"""Prepared data: tokenised splits in plain .npy files, read by memory mapping.

A prepared directory holds ``description.json`` and, for each split, the flat ``tokens``, the ``offsets`` of the
examples in them, their ``labels``, and their ``slots``: where in the example the answer is read (see
`fedhpc.data.tasks.EncodedText`). Of texts to be generated it holds ``spans``, the tokens that are trained, in place of
slots; ``labels`` are their categories, ``devices`` whose they are. Nothing in it is ever unpickled.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, Self, get_origin

import numpy as np
import torch

from fedhpc.errors import DataError
from fedhpc.files import check_folder, naming, replacing

FORMAT = "fedhpc-prepared"
VERSION = 1
_DESCRIPTION = "description.json"
_OF_ALL = {"tokens": np.int32, "offsets": np.int64, "labels": np.int32}
_OF_CLASSES = {**_OF_ALL, "slots": np.int32}
_OF_GENERATION = {**_OF_ALL, "spans": np.int64, "devices": np.int32}
_PREPARE_AGAIN = "run `fedhpc prepare` again"
_PROBE = "It was a naïve test — Yes, No; 3.14 of 東京\n"


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a prepared directory holds, and what it was made from and for."""

    format: str = FORMAT
    version: int = VERSION
    task: str
    head: str
    """``verbalizer``, ``linear``, or ``language_model`` for texts to be generated."""
    kind: str
    """``encoder`` or ``decoder``."""
    model: str
    """The model's name or path, as given."""
    tokenizer_sha256: str
    """See `tokenizer_fingerprint`."""
    pad_id: int
    max_length: int
    template: str
    class_names: list[str]
    """The classes' label values in the source; of texts to be generated their categories, where they have some."""
    class_words: list[str]
    word_ids: list[list[int]]
    """Token ids of each class word; empty lists with a linear head."""
    metric: str
    splits: dict[str, Any]
    """Split -> examples, tokens, longest, class_counts."""
    files: dict[str, Any]
    """File name -> bytes, sha256."""
    selected: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Which of the source's examples these are: limit_train, seed, validation; empty where that was not recorded."""
    generation: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Of texts to be generated, how they were put together; empty for classification."""

    @property
    def sha256(self) -> str:
        """Checksum of all that the description says of the data, the files' checksums included.

        How the examples were selected is not: that older descriptions do not say.
        """
        content = self._content()
        del content["selected"]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> str:
        """The text of ``description.json``, its own checksum included."""
        return json.dumps({**self._content(), "sha256": self.sha256}, indent=1, ensure_ascii=False) + "\n"

    def _content(self) -> dict[str, Any]:
        """All fields; descriptions of classification did not always have `generation`, and do without it."""
        content = dataclasses.asdict(self)
        if not self.generation:
            del content["generation"]
        return content

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read and check ``description.json``; DataError if it is none of this version."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: not valid JSON ({error}); {_PREPARE_AGAIN}") from error
        found = (content.get("format"), content.get("version")) if isinstance(content, dict) else (None, None)
        if found != (FORMAT, VERSION):
            raise DataError(
                f"{path}: expected format {FORMAT!r} version {VERSION}, found {found[0]!r} version {found[1]!r}; "
                + _PREPARE_AGAIN
            )
        stated = content.pop("sha256", None)
        types: dict[str, Any] = {item.name: get_origin(item.type) or item.type for item in dataclasses.fields(cls)}
        wrong = sorted({"selected", "generation", *content} ^ types.keys())
        wrong += [key for key in types if key in content and not isinstance(content[key], types[key])]
        if wrong:
            raise DataError(f"{path}: missing, unknown or of the wrong type: {', '.join(wrong)}; {_PREPARE_AGAIN}")
        description = cls(**content)
        if description.sha256 != stated:
            raise DataError(f"{path}: altered: its content does not have the checksum it states; {_PREPARE_AGAIN}")
        return description


class Targets(NamedTuple):
    """The m trained tokens of a batch's texts, in their order, and where each is predicted."""

    texts: torch.Tensor
    """int64 ``[m]``: whose."""
    columns: torch.Tensor
    """int64 ``[m]``: of the text's token before it."""
    tokens: torch.Tensor
    """int64 ``[m]``"""
    counts: tuple[int, ...]
    """Trained tokens of each device; their sum is m."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Examples right-padded to the longest of them."""

    input_ids: torch.Tensor
    """int64 ``[b, s]``."""
    attention_mask: torch.Tensor
    """bool ``[b, s]``."""
    slots: torch.Tensor
    """int64 ``[b]``."""
    labels: torch.Tensor
    """int64 ``[b]``."""
    sizes: tuple[int, ...]
    """Examples of each device that has some in the batch, in their order; their sum is b."""
    lengths: np.ndarray
    """Tokens of each example [b], where the host can read them."""
    targets: Targets | None = None
    """Of texts to be generated."""
    openings: torch.Tensor | None = None
    """int64 ``[b]``: tokens of each text before what is to be generated; None: all of them."""

    @property
    def terms(self) -> tuple[int, ...]:
        """Terms of each device's mean loss: its examples, or its trained tokens."""
        return self.sizes if self.targets is None else self.targets.counts

    @property
    def given(self) -> torch.Tensor:
        """bool ``[b, s]``: the tokens that are known before any is predicted."""
        if self.openings is None:
            return self.attention_mask
        return torch.arange(self.input_ids.shape[1], device=self.openings.device) < self.openings[:, None]

    @property
    def is_padded(self) -> bool:
        """Whether the texts are of several lengths."""
        return bool(self.lengths.min(initial=self.input_ids.shape[1]) < self.input_ids.shape[1])

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another torch device; to a GPU without waiting for it."""
        if device.type == "cpu":
            return self

        def move(value: Any) -> Any:
            if isinstance(value, Targets):
                return Targets(*map(move, value))
            if not isinstance(value, torch.Tensor):
                return value
            return (value.pin_memory() if device.type == "cuda" else value).to(device, non_blocking=True)

        return Batch(**{item.name: move(getattr(self, item.name)) for item in dataclasses.fields(self)})


@dataclass(frozen=True, kw_only=True)
class Split:
    """The n examples of one split."""

    tokens: np.ndarray
    """Token ids of all examples, one example after the other."""
    offsets: np.ndarray
    """[n + 1]: where each begins in `tokens`, and the end."""
    labels: np.ndarray
    """[n]"""
    slots: np.ndarray
    """[n]: the token of each at which its answer is predicted."""
    pad_id: int
    spans: np.ndarray | None = None
    """[2 k], ascending: begin and end in `tokens` of each of k spans of trained tokens; none is an example's first."""
    devices: np.ndarray | None = None
    """[n]: the device that each belongs to by nature, where the data say so."""

    @classmethod
    def of(
        cls, examples: Sequence[tuple[Sequence[int] | np.ndarray, int]], labels: Sequence[int], *, pad_id: int
    ) -> Self:
        """A split of examples in memory, each its token ids and slot."""
        return cls(
            tokens=np.concatenate([np.asarray(ids, np.int32) for ids, _ in examples]),
            offsets=np.cumsum([0, *(len(ids) for ids, _ in examples)]),
            labels=np.asarray(labels, np.int32),
            slots=np.asarray([slot for _, slot in examples], np.int32),
            pad_id=pad_id,
        )

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each example."""
        return np.diff(self.offsets)

    @cached_property
    def num_terms(self) -> np.ndarray:
        """Terms of the loss in each example [n]: one, or its trained tokens."""
        if self.spans is None:
            return np.ones(len(self), np.int64)
        before = np.concatenate([[0], np.cumsum(self.spans[1::2] - self.spans[::2])])
        return np.diff(before[np.searchsorted(self.spans[::2], self.offsets)])

    @cached_property
    def openings(self) -> np.ndarray:
        """Tokens of each example before its first trained one [n]; all of them where nothing is trained."""
        if self.spans is None:
            return self.lengths
        begins = np.append(self.spans[::2], self.offsets[-1])
        firsts = begins[np.searchsorted(self.spans[::2], self.offsets[:-1])]
        return np.minimum(firsts, self.offsets[1:]) - self.offsets[:-1]

    def spans_of(self, example: int) -> np.ndarray:
        """Begin and end [k, 2] of an example's trained tokens, from its first token on."""
        assert self.spans is not None
        first, last = np.searchsorted(self.spans[::2], self.offsets[example : example + 2])
        return self.spans[2 * first : 2 * last].reshape(-1, 2) - self.offsets[example]

    def batch(self, indices: Sequence[int] | np.ndarray, sizes: Sequence[int] | None = None) -> Batch:
        """These examples, in this order; of one device unless ``sizes`` says of which."""
        chosen = np.asarray(indices, np.int64)
        sizes = (len(chosen),) if sizes is None else tuple(sizes)
        lengths = self.offsets[chosen + 1] - self.offsets[chosen]
        mask = np.arange(lengths.max(initial=0)) < lengths[:, None]
        ids = np.full(mask.shape, self.pad_id, np.int64)
        for row, (start, length) in enumerate(zip(self.offsets[chosen], lengths, strict=True)):
            ids[row, :length] = self.tokens[start : start + length]
        return Batch(
            input_ids=torch.from_numpy(ids),
            attention_mask=torch.from_numpy(mask),
            slots=torch.from_numpy(self.slots[chosen].astype(np.int64)),
            labels=torch.from_numpy(self.labels[chosen].astype(np.int64)),
            sizes=sizes,
            lengths=lengths,
            targets=None if self.spans is None else self._targets(chosen, sizes),
            openings=None if self.spans is None else torch.from_numpy(self.openings[chosen]),
        )

    def _targets(self, chosen: np.ndarray, sizes: Sequence[int]) -> Targets:
        places = [
            np.concatenate([np.arange(0), *(np.arange(begin, end) for begin, end in self.spans_of(example))])
            for example in chosen
        ]
        tokens = [self.tokens[self.offsets[example] + own] for example, own in zip(chosen, places, strict=True)]
        texts = np.repeat(np.arange(len(chosen)), [len(own) for own in places])
        parts = (texts, np.concatenate(places) - 1, np.concatenate(tokens))
        of_text, columns, wanted = (torch.from_numpy(part.astype(np.int64)) for part in parts)
        counts = (int(own.sum()) for own in np.split(self.num_terms[chosen], np.cumsum(sizes)[:-1]))
        return Targets(of_text, columns, wanted, tuple(counts))


class PreparedData:
    """A prepared directory, open for reading."""

    def __init__(self, path: Path, description: Description):
        self.path = path
        self.description = description

    @classmethod
    def open(cls, path: str | Path, *, verify: bool) -> Self:
        """Check that the directory is whole; ``verify`` also reads every file and compares its checksum.

        Raises:
            DataError: it is not.
        """
        path = Path(path)
        if not (path / _DESCRIPTION).is_file():
            found = "holds no description.json" if path.is_dir() else "is no directory"
            raise DataError(f"{path.absolute()} {found}; prepare the data with fedhpc prepare --out {path}")
        description = Description.load(path / _DESCRIPTION)
        for name, expected in description.files.items():
            _check_file(path / name, expected, verify=verify)
        return cls(path, description)

    def split(self, name: str) -> Split:
        """One split, memory-mapped; DataError if it is not there or not readable."""
        if name not in self.description.splits:
            raise DataError(f"{self.path} has no split {name!r}, only {', '.join(self.description.splits)}")
        dtypes = _dtypes(self.description.head)
        arrays = {part: self._array(f"{name}.{part}.npy", dtype) for part, dtype in dtypes.items()}
        offsets, num_examples = arrays["offsets"], self.description.splits[name]["examples"]
        of_each = [len(arrays[part]) for part in ("labels", "slots", "devices") if part in arrays]
        if {len(offsets) - 1, *of_each} != {num_examples} or offsets[-1] != len(arrays["tokens"]):
            raise DataError(f"{self.path}: the files of split {name!r} do not fit together; {_PREPARE_AGAIN}")
        return Split(**({"slots": np.diff(offsets) - 1} | arrays), pad_id=self.description.pad_id)

    def _array(self, name: str, dtype: type) -> np.ndarray:
        try:
            array = np.load(self.path / name, mmap_mode="r", allow_pickle=False)
        except Exception as error:  # NumPy reads the header with Python's own tokenizer and parser
            raise DataError(f"{self.path / name}: not a readable .npy file ({error}); {_PREPARE_AGAIN}") from error
        if array.dtype != dtype or array.ndim != 1:
            raise DataError(f"{self.path / name}: {array.dtype} {array.shape} is not a list of {dtype.__name__}")
        return array


def _dtypes(head: str) -> dict[str, Any]:
    """The arrays of a split, by the head that reads its texts."""
    return _OF_GENERATION if head == "language_model" else _OF_CLASSES


def _check_file(file: Path, expected: dict[str, Any], *, verify: bool) -> None:
    if not file.is_file():
        raise DataError(f"{file}: missing; {_PREPARE_AGAIN}")
    size = file.stat().st_size
    if size != expected["bytes"]:
        change = "cut short" if size < expected["bytes"] else "too long"
        raise DataError(f"{change}: {file} has {size} bytes, description says {expected['bytes']}; {_PREPARE_AGAIN}")
    if verify and _sha256(file) != expected["sha256"]:
        raise DataError(f"altered: {file} is not what was prepared (its checksum differs); {_PREPARE_AGAIN}")


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_writable(path: str | Path) -> None:
    """DataError for a target that is anything but absent, empty, or a prepared directory with nothing else in it."""
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise DataError(f"{path} is a file; give a directory to write to")
    try:
        check_folder(Path(os.path.realpath(path)).parent)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.filename}: {error.strerror}") from None
    if not path.exists() or not any(path.iterdir()):
        return
    try:
        known = {_DESCRIPTION, *Description.load(path / _DESCRIPTION).files}
    except (DataError, OSError) as error:
        raise DataError(f"{path} holds something other than prepared data; give a new directory") from error
    others = sorted(entry.name for entry in path.iterdir() if entry.name not in known)
    if others:
        raise DataError(f"{path} also holds {', '.join(others)}, which replacing it would delete; give a new directory")


def write_prepared(path: str | Path, description_fields: Mapping[str, Any], splits: Mapping[str, Split]) -> Description:
    """Write a prepared directory, all of it or nothing, in place of an older one.

    ``description_fields`` are those of `Description` that do not follow from the splits themselves.
    """
    path = Path(path)
    check_writable(path)
    with replacing(path) as folder:
        files = {}
        for name, split in splits.items():
            for part, dtype in _dtypes(description_fields["head"]).items():
                file = folder / f"{name}.{part}.npy"
                _write(file, partial(np.save, arr=np.asarray(getattr(split, part), dtype), allow_pickle=False))
                files[file.name] = {"bytes": file.stat().st_size, "sha256": _sha256(file)}
        num_classes = len(description_fields["class_names"])
        summaries = {name: _summary(split, num_classes) for name, split in splits.items()}
        description = Description(**description_fields, splits=summaries, files=files)
        # A path need not be Unicode; what is not becomes an escape of JSON.
        content = description.to_json().encode(errors="backslashreplace")
        _write(folder / _DESCRIPTION, lambda stream: stream.write(content))
    return description


def _summary(split: Split, num_classes: int) -> dict[str, Any]:
    return {
        "examples": len(split),
        "tokens": len(split.tokens),
        "longest": int(split.lengths.max(initial=0)),
        "class_counts": np.bincount(split.labels, minlength=num_classes).tolist() if num_classes else [],
        **({} if split.spans is None else {"trained_tokens": int(split.num_terms.sum())}),
    }


def _write(file: Path, fill: Callable[[Any], Any]) -> None:
    with naming(file), file.open("w+b") as stream:  # of a file open for writing alone, NumPy hides what went wrong
        fill(stream)
        stream.flush()
        os.fsync(stream.fileno())


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A checksum of all that decides which ids a Hugging Face tokenizer gives to a text.

    The padding token is left out: models without one borrow another, and padding is masked anyway.
    """
    names = ("bos", "eos", "unk", "sep", "cls", "mask")
    special = [getattr(tokenizer, f"{name}_token_id", None) for name in names]
    content = [sorted(tokenizer.get_vocab().items()), special, list(tokenizer(_PROBE, verbose=False)["input_ids"])]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
