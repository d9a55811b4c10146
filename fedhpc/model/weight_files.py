"""Weights as they lie in files: mapped into memory, so that all ranks of a node share one copy, and recognised.

The safetensors format: https://github.com/huggingface/safetensors#format.
"""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import (
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
)

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
HEADER_LENGTH_BYTES = 8
SAMPLES, SAMPLE_BYTES = 2000, 4096
CHUNK_BYTES = 2**24
"""A file is read in pieces of this size."""


@dataclass(frozen=True, kw_only=True)
class Stored:
    """Where in a file a tensor lies."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    first: int
    """Byte at which it begins."""

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, first: int, nbytes: int) -> np.ndarray:
        """So many bytes of it, fewer at its end, from one on."""
        return np.fromfile(self.file, np.uint8, min(nbytes, self.nbytes - first), offset=self.first + first)

    def widened(self) -> Tensor:
        """The tensor in float32, read by and by."""
        whole = torch.empty(self.shape, dtype=torch.float32)
        for first in range(0, self.nbytes, CHUNK_BYTES):
            part = torch.from_numpy(self.read(first, CHUNK_BYTES)).view(self.dtype)
            whole.view(-1)[first // self.dtype.itemsize :][: len(part)] = part
        return whole


def stored_weights(name: str) -> dict[str, Stored] | None:
    """Tensors of a local or cached model by name, or None if they are not in safetensors files that can be mapped."""
    tensors: dict[str, Stored] = {}
    for file in _safetensors_files(name):
        stored = _stored(file)
        if stored is None:
            return None
        tensors |= stored
    return tensors or None


def mapped_weights(name: str, dtype: torch.dtype | None = None) -> dict[str, Tensor] | None:
    """The same, mapped into memory: pages are read when they are used, and never written.

    Args:
        dtype: in which they are wanted. What 16 bits hold and float32 is wanted of is no mapping, but converted here,
            so that a tensor is not in memory in both types.
    """
    stored = stored_weights(name)
    if stored is None:
        return None
    files = sorted({each.file for each in stored.values()})
    content = {
        file: torch.from_file(str(file), shared=False, size=file.stat().st_size, dtype=torch.uint8) for file in files
    }
    return {
        name: each.widened()
        if dtype == torch.float32 and each.dtype in (torch.bfloat16, torch.float16)
        else content[each.file][each.first : each.first + each.nbytes].view(each.dtype).view(each.shape)
        for name, each in stored.items()
    }


def model_sha256(name: str) -> str:
    """SHA-256 of a local or cached model's config.json, and of samples from all over its weight files.

    Raises:
        OSError: it has no weight files.
    """
    return _samples_sha256([Path(str(cached_file(name, CONFIG_NAME))), *_weight_files(name)])


def weights_sha256(name: str) -> str:
    """SHA-256 of samples from all over a model's tensors, however safetensors files divide them.

    Raises:
        OSError: it has no weight files.
    """
    files, tensors = _weight_files(name), stored_weights(name)
    if tensors is None:
        return _samples_sha256(files)
    digest = hashlib.sha256()
    distance = max(SAMPLE_BYTES, sum(tensor.nbytes for tensor in tensors.values()) // SAMPLES)
    for key in sorted(tensors):
        tensor = tensors[key]
        digest.update(f"{key} {tensor.dtype} {tensor.shape}".encode())
        for offset in range(0, tensor.nbytes, distance):
            digest.update(tensor.read(offset, SAMPLE_BYTES).tobytes())
    return digest.hexdigest()


def _weight_files(name: str) -> list[Path]:
    weights = _safetensors_files(name) or _files(name, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
    if not weights:
        raise OSError(f"there is no {SAFE_WEIGHTS_NAME} or {WEIGHTS_NAME}")
    return weights


def _samples_sha256(files: list[Path]) -> str:
    sizes = [file.stat().st_size for file in files]
    distance = max(SAMPLE_BYTES, sum(sizes) // SAMPLES)
    digest = hashlib.sha256(repr(sizes).encode())
    for file, size in zip(files, sizes, strict=True):
        with file.open("rb") as stream:
            for offset in range(0, size, distance):
                stream.seek(offset)
                digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _safetensors_files(name: str) -> list[Path]:
    return _files(name, SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)


def _files(name: str, single_name: str, index_name: str) -> list[Path]:
    single = cached_file(name, single_name, _raise_exceptions_for_missing_entries=False)
    if single is not None:
        return [Path(single)]
    index = cached_file(name, index_name, _raise_exceptions_for_missing_entries=False)
    if index is None:
        return []
    try:
        shards = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{index} is no index of weight files: it has no weight_map of names to files") from None
    return [Path(str(cached_file(name, shard))) for shard in shards]


def _stored(file: Path) -> dict[str, Stored] | None:
    try:
        with safe_open(file, framework="pt"):  # sees that the header describes this file
            pass
    except SafetensorError as error:
        size = file.stat().st_size
        raise ValueError(f"{file} ({size} bytes) is cut short or no safetensors file: {error}") from None
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(HEADER_LENGTH_BYTES), "little")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        dtype = DTYPES.get(entry["dtype"])
        first = HEADER_LENGTH_BYTES + length + entry["data_offsets"][0]
        if dtype is None or first % dtype.itemsize:
            return None
        tensors[name] = Stored(file=file, dtype=dtype, shape=tuple(entry["shape"]), first=first)
    return tensors
