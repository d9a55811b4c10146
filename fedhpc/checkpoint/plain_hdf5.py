"""State files opened: HDF5 that anyone may have made, of which nothing is used before all of it is known to be plain.

A file can lead to other files (external and virtual data, links), can go round in circles, and can say that a few bytes
are terabytes (filters that compress, space that was never written, one stored object under many names). What fedhpc
writes does none of that, so none of it is read.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import h5py
import numpy as np
from h5py import h5a, h5d, h5g, h5l, h5o, h5z

from fedhpc.errors import CheckpointError, UserError

FORMAT = "fedhpc-checkpoint"
VERSION = 3
UNREADABLE = (OSError, LookupError, AttributeError, ValueError, TypeError, RuntimeError, ArithmeticError)
"""What h5py, NumPy and json raise for content that is not what it should be."""
LAYOUTS = (h5d.COMPACT, h5d.CONTIGUOUS, h5d.CHUNKED)
LEAST_CHUNK_BYTES = 4096
"""The chunks of a data set must have so many bytes on average: every chunk takes a search."""
DEEPEST = 8


@contextmanager
def open_state(data: bytes, name: str) -> Iterator[h5py.File]:
    """A state file's content for reading; whatever is wrong with it becomes one CheckpointError."""
    try:
        with h5py.File.in_memory(data) as file:
            _check(file, len(data))
            if file.attrs.get("format") != FORMAT:
                raise CheckpointError(f"{name}: is HDF5, but not a fedhpc checkpoint")
            if (version := int(file.attrs.get("version", 0))) != VERSION:
                raise CheckpointError(f"{name}: has format version {version}; this fedhpc reads version {VERSION}")
            yield file
    except UserError:
        raise
    except UNREADABLE as error:
        what = str(error).strip("'\"")  # KeyError's is quoted
        raise CheckpointError(f"{name}: cannot be read as a checkpoint: {what}") from None


def _check(file: h5py.File, num_bytes: int) -> None:
    """Hard links in a tree; datasets and attributes of numbers, or one text, that together fit into the file."""
    waiting: list[tuple[str, Any, bytes]] = [("", file.id, b"/")]
    seen, size = set(), 0
    while waiting:
        path, group, name = waiting.pop()
        item = h5o.open(group, name)
        address = h5o.get_info(item).addr
        if address in seen or path.count("/") > DEEPEST:
            raise ValueError(f"{path} {'has a second name' if address in seen else 'is too deep'}")
        seen.add(address)
        size += sum(_attribute_bytes(item, place, path) for place in range(h5a.get_num_attrs(item)))
        if isinstance(item, h5d.DatasetID):
            size += _dataset_bytes(item, path, num_bytes)
        elif isinstance(item, h5g.GroupID):
            for inner in item:
                inner_path = f"{path}/{inner.decode(errors='replace')}"
                if item.links.get_info(inner).type != h5l.TYPE_HARD:
                    raise ValueError(f"{inner_path} is a link to another place")
                waiting.append((inner_path, item, inner))
        else:
            raise ValueError(f"{path} is neither a group nor a dataset")
        if size > num_bytes:
            raise ValueError(f"up to {path} it says that it holds {size} bytes, and the file has {num_bytes}")


def _attribute_bytes(item: Any, place: int, path: str) -> int:
    attribute = h5a.open(item, index=place)
    dtype, shape = attribute.dtype, attribute.shape
    if shape == () and h5py.check_string_dtype(dtype) is not None:
        return 0  # stored once, whole
    return _bytes_of(dtype, shape, f"attribute {attribute.name.decode(errors='replace')} of {path or '/'}")


def _dataset_bytes(dataset: Any, path: str, num_bytes: int) -> int:
    how = dataset.get_create_plist()  # before its shape, for which virtual data would open other files
    filters = {how.get_filter(place)[0] for place in range(how.get_nfilters())}
    if how.get_layout() not in LAYOUTS or how.get_external_count():
        raise ValueError(f"{path} is stored in another place")
    if not filters <= {h5z.FILTER_FLETCHER32}:
        raise ValueError(f"{path} is compressed or filtered")
    dtype, shape = dataset.dtype, dataset.shape
    size = _bytes_of(dtype, shape, path)
    if how.get_layout() == h5d.CHUNKED:
        parts = how.get_chunk()
        chunk = prod(parts) * dtype.itemsize
        num_chunks = prod(-(-length // part) for length, part in zip(shape, parts, strict=True))
        if chunk > num_bytes or num_chunks > 1 + size // LEAST_CHUNK_BYTES:
            raise ValueError(f"{path} of {size} bytes is stored in {num_chunks} chunks of {chunk} bytes")
    return size


def _bytes_of(dtype: np.dtype, shape: tuple[int, ...] | None, what: str) -> int:
    if dtype.kind not in "biuf" or dtype.itemsize > 8 or shape is None:
        raise ValueError(f"{what} has type {dtype} and shape {shape}; numbers of at most 8 bytes are valid")
    return prod(shape) * dtype.itemsize
