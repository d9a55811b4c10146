"""Weights as they lie in files: mapped into memory, so that all ranks of a node share one copy, and recognised.

The safetensors format: https://github.com/huggingface/safetensors#format.
"""

import hashlib
import json
from pathlib import Path

import torch
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


def mapped_weights(name: str) -> dict[str, Tensor] | None:
    """All tensors of a local or cached model by name, or None if they are not in safetensors files that can be mapped.

    Pages are read when they are used, and never written.
    """
    tensors: dict[str, Tensor] = {}
    for file in _safetensors_files(name):
        mapped = _mapped(file)
        if mapped is None:
            return None
        tensors |= mapped
    return tensors or None


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
    files, tensors = _weight_files(name), mapped_weights(name)
    if tensors is None:
        return _samples_sha256(files)
    digest = hashlib.sha256()
    distance = max(SAMPLE_BYTES, sum(tensor.nbytes for tensor in tensors.values()) // SAMPLES)
    for key in sorted(tensors):
        tensor = tensors[key]
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        content = tensor.reshape(-1).view(torch.uint8)
        for offset in range(0, len(content), distance):
            digest.update(content[offset : offset + SAMPLE_BYTES].numpy().tobytes())
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
    shards = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
    return [Path(str(cached_file(name, shard))) for shard in shards]


def _mapped(file: Path) -> dict[str, Tensor] | None:
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(HEADER_LENGTH_BYTES), "little")
        try:
            header = json.loads(stream.read(min(length, size)))
        except ValueError:
            raise ValueError(f"{file} ({size} bytes) is cut short or no safetensors file") from None
    header.pop("__metadata__", None)
    needed = HEADER_LENGTH_BYTES + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size < needed:
        raise ValueError(f"{file} is cut short: {size} bytes instead of {needed}")
    content = torch.from_file(str(file), shared=False, size=size, dtype=torch.uint8)
    tensors = {}
    for name, entry in header.items():
        dtype = DTYPES.get(entry["dtype"])
        first, end = (HEADER_LENGTH_BYTES + length + offset for offset in entry["data_offsets"])
        if dtype is None or first % dtype.itemsize:
            return None
        tensors[name] = content[first:end].view(dtype).view(entry["shape"])
    return tensors
