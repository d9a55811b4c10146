"""Sums over a round's devices, the innermost loop of the server step.

In one pass over each vector where the installation found a C compiler (`adding.c`), else in several of NumPy's: the
same bits.
"""

import ctypes
from collections.abc import Callable, Iterable
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedhpc.methods.updates import Sums, Vector

Add = Callable[..., Any]
"""`add` of adding.c: addresses of a term [n], of the mean [n] and of the total [n] or None; the term's weight; n."""


def add_up(terms: Iterable[Vector], weights: NDArray[np.float64], size: int, *, with_total: bool = False) -> Sums:
    """Sums of a vector [n] of each device, one after the other, in float64.

    Args:
        terms: the vectors; each is added before the next is asked for.
        weights: w_i of each.
        size: n.
        with_total: whether to add them up without weights, too.
    """
    return _add_up(compiled(), terms, weights, size, with_total=with_total)


@cache
def compiled() -> Add | None:
    """The compiled loop; None where there is none."""
    found = find_spec("fedhpc._adding")
    return load(found.origin) if found and found.origin else None


def load(path: str) -> Add | None:
    """The loop in a library; None if it cannot be loaded, or its compiler rounds a product and a sum as one."""
    try:
        add = ctypes.CDLL(path).add
    except OSError:
        return None
    address = ctypes.c_void_p
    add.argtypes, add.restype = (address, ctypes.c_double, address, address, ctypes.c_size_t), None
    terms = np.random.default_rng(0).standard_normal((2, 1001), np.float32)
    for with_total in (False, True):
        found, expected = (
            _add_up(each, terms, np.array([0.3, 0.7]), terms.shape[1], with_total=with_total) for each in (add, None)
        )
        if not np.array_equal(found.mean, expected.mean):
            return None
    return add


def _add_up(
    add: Add | None, terms: Iterable[Vector], weights: NDArray[np.float64], size: int, *, with_total: bool
) -> Sums:
    mean, total, wide = np.zeros(size), np.zeros(size) if with_total else None, np.empty(size)
    sums = mean.ctypes.data, None if total is None else total.ctypes.data
    for term, weight in zip(terms, weights, strict=True):
        if add and _is_plain(term, size):
            add(term.ctypes.data, weight, *sums, size)
            continue
        wide[:] = term  # NumPy takes twice as long over operands of two types
        if total is not None:
            total += wide
        wide *= weight
        mean += wide
    return Sums(mean=mean, total=total)


def _is_plain(term: Vector, size: int) -> bool:
    """Whether C can read it; a method's own `change` may give anything."""
    return (
        isinstance(term, np.ndarray)
        and term.dtype == np.float32
        and term.shape == (size,)
        and term.flags.c_contiguous
        and term.flags.aligned
    )
