"""State files opened: HDF5 that anyone may have made, of which nothing is used before all of it is known to be plain.

A file can lead to other files (external and virtual data, links), can go round in circles, and can say that a few bytes
are terabytes (filters that compress, space that was never written, one stored object under many names). What fedhpc
writes does none of that, so none of it is read.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod

import h5py
import numpy as np
from h5py import h5a, h5d, h5o, h5z

from fedhpc.errors import CheckpointError, UserError

FORMAT = "fedhpc-checkpoint"
VERSION = 3
UNREADABLE = (OSError, LookupError, AttributeError, ValueError, TypeError, RuntimeError, ArithmeticError)
"""What h5py, NumPy and json raise for content that is not what it should be."""
LAYOUTS = (h5d.COMPACT, h5d.CONTIGUOUS, h5d.CHUNKED)
LEAST_CHUNK_BYTES = 4096
"""On average: every chunk takes a search."""
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
    waiting, seen, size = [(file["/"], 0)], {h5o.get_info(file["/"].id).addr}, 0
    while waiting:
        item, depth = waiting.pop()
        size += sum(_attribute_bytes(item, place) for place in range(h5a.get_num_attrs(item.id)))
        if isinstance(item, h5py.Dataset):
            size += _dataset_bytes(item, num_bytes)
        elif isinstance(item, h5py.Group):
            for name in item:
                if not isinstance(item.get(name, getlink=True), h5py.HardLink):
                    raise ValueError(f"{item.name}: {name} is a link to another place")
                inner = item[name]
                address = h5o.get_info(inner.id).addr
                if address in seen or depth == DEEPEST:
                    raise ValueError(f"{inner.name} {'has a second name' if address in seen else 'is too deep'}")
                seen.add(address)
                waiting.append((inner, depth + 1))
        else:
            raise ValueError(f"{item.name} is neither a group nor a dataset")
        if size > num_bytes:
            raise ValueError(f"{item.name}: by here it says that it holds {size} bytes, and the file has {num_bytes}")


def _attribute_bytes(item: h5py.HLObject, place: int) -> int:
    attribute = h5a.open(item.id, index=place)
    dtype, shape = attribute.dtype, attribute.shape
    if h5py.check_string_dtype(dtype) is not None and shape == ():
        return 0  # stored once, whole
    return _bytes_of(dtype, shape, f"attribute {attribute.name.decode(errors='replace')} of {item.name}")


def _dataset_bytes(dataset: h5py.Dataset, num_bytes: int) -> int:
    how = dataset.id.get_create_plist()  # before its shape, for which virtual data would open other files
    filters = {how.get_filter(place)[0] for place in range(how.get_nfilters())}
    if how.get_layout() not in LAYOUTS or how.get_external_count():
        raise ValueError(f"{dataset.name} is stored in another place")
    if not filters <= {h5z.FILTER_FLETCHER32}:
        raise ValueError(f"{dataset.name} is compressed or filtered")
    size = _bytes_of(dataset.dtype, dataset.shape, dataset.name)
    if dataset.chunks is not None:
        chunk = prod(dataset.chunks) * dataset.dtype.itemsize
        num_chunks = prod(-(-length // part) for length, part in zip(dataset.shape, dataset.chunks, strict=True))
        if chunk > num_bytes or num_chunks > 1 + size // LEAST_CHUNK_BYTES:
            raise ValueError(f"{dataset.name} of {size} bytes is stored in {num_chunks} chunks of {chunk} bytes")
    return size


def _bytes_of(dtype: np.dtype, shape: tuple[int, ...] | None, name: str) -> int:
    if dtype.kind not in "biuf" or dtype.itemsize > 8 or shape is None:
        raise ValueError(f"{name} has type {dtype} and shape {shape}; numbers of at most 8 bytes are valid")
    return prod(shape) * dtype.itemsize
