"""Checks for parts of your own, to be called in your tests: what fedhpc relies on, shown with made numbers.

Each raises AssertionError with what does not hold.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from fedhpc.config import Config, least_values, section_of
from fedhpc.errors import ConfigError
from fedhpc.exchange.encoding import Encoding
from fedhpc.federation.partition import Partitioner, make_partition
from fedhpc.methods import FedAvg, Method, Population, ServerState
from fedhpc.methods.base import STEP_BLOCK
from fedhpc.methods.updates import Layout, RoundUploads, Vector
from fedhpc.registry import ENCODINGS, METHODS, PARTITIONS, Registry

SIZE = STEP_BLOCK + 1001
"""Elements of the vectors: more than one block, and no whole number of them."""
NUM_DEVICES, SAMPLED = 7, 4


def check_method(part: type[Method], **keys: Any) -> None:
    """A server method: pure, block by block equal, the same from a checkpoint.

    Args:
        part: the method's class, registered.
        keys: of its Config, where they are not to be as by default.

    Examples:
        >>> fedhpc.testing.check_method(Mine, rho=0.2)
    """
    method = _method(part, keys)
    state = method.init(_vector(0))
    for round_index in range(3):
        uploads = _uploads(method, state, round_index)
        before, sent = _copy(state), [*map(np.copy, uploads.params)]
        new = method.update(state, uploads)
        assert _equal(before, state), "update changed the state that it was given; make new vectors"
        assert all(map(np.array_equal, sent, uploads.params)), "update changed the uploads that it was given"
        assert new.round == state.round + 1, f"the state after round {state.round} says round {new.round}"
        assert _equal(method.update(state, uploads), new), "the same state and uploads led to another state"
        assert _equal(_method(part, keys).update(_restored(state), uploads), new), (
            "a new method that went on from a checkpoint led to another state: what it carries from round to round "
            "belongs into ServerState"
        )
        _check_blocks(method, state, uploads, new)
        for name, vector in {"params": new.params, **new.vectors}.items():
            assert vector.dtype == np.float32, f"{name} is {vector.dtype}, not float32"
            assert vector.shape == state.params.shape, f"{name} has the shape {vector.shape}"
            assert np.isfinite(vector).all(), f"{name} is not finite"
        state = new


def _check_blocks(method: Method, state: ServerState, uploads: RoundUploads, new: ServerState) -> None:
    if type(method).update is not Method.update:
        return  # it looks at whole tensors
    for block in (slice(0, 5), slice(STEP_BLOCK - 3, STEP_BLOCK + 4), slice(SIZE - 9, SIZE)):
        part = method.step(state.restrict(block), uploads.block(block))
        assert np.array_equal(part.params, new.params[block]), (
            f"elements {block.start} to {block.stop} come out otherwise when they are computed by themselves: an "
            "element of `step` must depend on that element alone; override `update` for a method that needs all of them"
        )


def check_encoding(part: type[Encoding], **keys: Any) -> None:
    """An upload encoding: pure, of the length that it says, decoded to what the server can use, nothing lost for good.

    What a device keeps makes up for what was not sent: over many uploads the server has got all changes.
    """
    exchange = {"encoding": _name(ENCODINGS, part), **keys}
    config = Config.model_validate({**least_values(), "exchange": exchange})
    encoding = part.make(config, _method(FedAvg, {}))
    kept: dict[str, np.ndarray] = {}
    start, sent, wanted = _vector(0), np.zeros(SIZE), np.zeros(SIZE)
    for round_index in range(4):
        params = start + np.float32(0.01) * _vector(round_index + 1)
        before = {name: vector.copy() for name, vector in kept.items()}
        payload, new = encoding.encode(params, start, kept, num_steps=3, learning_rate=0.1)
        again, _ = encoding.encode(params, start, kept, num_steps=3, learning_rate=0.1)
        assert _same_vectors(before, kept), "encode changed what the device keeps; make new vectors"
        assert np.array_equal(payload, again), "the same update led to another payload"
        assert (payload.dtype, payload.size) == (encoding.dtype, encoding.length(SIZE)), (
            f"the payload is {payload.size} x {payload.dtype}, but length and dtype say {encoding.length(SIZE)} x "
            f"{encoding.dtype}"
        )
        decoded = encoding.decode(payload, start)
        assert decoded.dtype == np.float32, f"decode gives {decoded.dtype}, not float32"
        assert decoded.shape == start.shape, f"decode gives the shape {decoded.shape}"
        assert encoding.keeps or not new, "encode returns what is to be kept, but `keeps` is False"
        sent += decoded.astype(np.float64) - start
        wanted += params.astype(np.float64) - start
        kept = new
    owed = kept.get("residual", np.zeros(SIZE, np.float32))
    assert np.allclose(sent + owed, wanted, atol=1e-4), (
        "what was sent and what is kept as `residual` do not add up to the changes"
    )


def check_partition(part: type[Partitioner], **keys: Any) -> None:
    """A partition: every example on exactly one device, unless it is natural; none empty, a function of the seed."""
    config = section_of(PARTITIONS, partition=_name(PARTITIONS, part), num_devices=NUM_DEVICES, **keys)
    rng = np.random.default_rng(0)
    num_groups = 2 * NUM_DEVICES if part.natural else 3
    labels, validation = rng.integers(0, num_groups, 500), rng.integers(0, num_groups, 60)
    try:
        one, same = (make_partition(labels, validation, config, 5) for _ in range(2))
    except ConfigError as error:
        raise AssertionError(str(error)) from error
    assert part.natural or np.array_equal(np.sort(np.concatenate(one.train)), np.arange(500)), (
        "an example is on no device, or on two"
    )
    assert all(map(np.array_equal, one.train, same.train)), "the same seed led to another partition"


def _name(registry: Registry, part: type) -> str:
    names = [name for name, each in registry.items() if each is part]
    assert names, f"{part.__qualname__} is not registered as a {registry.what}"
    return names[0]


def _method(part: type[Method], keys: Mapping[str, Any]) -> Method:
    config = section_of(METHODS, method=_name(METHODS, part), **keys)
    method = part.make(config, Population(num_devices=NUM_DEVICES, sample_rate=SAMPLED / NUM_DEVICES, total_count=70))
    method.layout = Layout({"tensor": (SIZE,)})
    return method


def _vector(seed: int) -> Vector:
    return np.random.default_rng(seed).standard_normal(SIZE, dtype=np.float32)


def _uploads(method: Method, state: ServerState, round_index: int) -> RoundUploads:
    rng = np.random.default_rng([5, round_index])
    params = [state.params + _vector(10 * round_index + i) / np.float32(100) for i in range(SAMPLED)]
    return RoundUploads(
        device_ids=rng.permutation(NUM_DEVICES)[:SAMPLED],
        num_examples=(num_examples := rng.integers(1, 20, SAMPLED)),
        counts=num_examples,
        num_steps=rng.integers(1, 9, SAMPLED),
        params=params,
        device_learning_rate=0.01,
        gradients=[_vector(100 + i) for i in range(SAMPLED)] if method.uploads_gradient else (),
    )


def _copy(state: ServerState) -> ServerState:
    return state.each(np.copy)


def _restored(state: ServerState) -> ServerState:
    """As it comes back from a checkpoint: other memory, plain numbers."""
    copy = _copy(state)
    return ServerState(
        round=copy.round,
        params=copy.params,
        vectors=copy.vectors,
        control=copy.control,
        scalars={name: float(value) for name, value in copy.scalars.items()},
    )


def _equal(one: ServerState, other: ServerState) -> bool:
    return (
        one.round == other.round
        and np.array_equal(one.params, other.params)
        and _same_vectors(one.vectors, other.vectors)
        and _same_vectors(one.control, other.control)
        and one.scalars == other.scalars
    )


def _same_vectors(one: Mapping[Any, np.ndarray], other: Mapping[Any, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(vector, other[name]) for name, vector in one.items())
