"""FlexLoRA's step against the definition, by hand and by NumPy's own decomposition of the whole product."""

import numpy as np
import pytest
from test_methods import method

from fedhpc.methods.flexlora import leading
from fedhpc.methods.updates import Layout, RoundUploads

RANK, INPUTS, OUTPUTS, LAYERS = 3, 12, 10, 2
LAYOUT = Layout(
    {"lora_A.q": (LAYERS, RANK, INPUTS), "lora_B.q": (LAYERS, OUTPUTS, RANK), "head.weight": (2, 5), "head.bias": (2,)}
)


def sent(num_devices, ranks=None, seed=0):
    """Uploads of so many devices, of their own ranks padded with zeros."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(num_devices, LAYOUT.size)).astype(np.float32)
    for vector, rank in zip(vectors, ranks or [], strict=False):
        views = LAYOUT.views(vector)
        views["lora_A.q"][:, rank:], views["lora_B.q"][..., rank:] = 0, 0
    examples = np.arange(1, num_devices + 1)
    return RoundUploads(
        device_ids=np.arange(num_devices)[::-1].copy(),
        num_examples=examples,
        counts=examples,
        num_steps=np.full(num_devices, 2),
        params=list(vectors),
        device_learning_rate=0.1,
    )


def mean_products(uploads):
    views = [LAYOUT.views(vector.astype(np.float64)) for vector in uploads.params]
    return sum(w * each["lora_B.q"] @ each["lora_A.q"] for w, each in zip(uploads.weights, views, strict=True))


def after(uploads):
    chosen = method(method="flexlora")
    chosen.layout = LAYOUT
    return LAYOUT.views(chosen.update(chosen.init(np.zeros(LAYOUT.size, np.float32)), uploads).params)


@pytest.mark.parametrize(
    ("num_devices", "ranks"),
    [
        (2, None),  # stacked factors of rank 6: the small product is decomposed
        (4, None),  # of rank 12, no less than the weights': the whole product is
        (3, [1, 2, 3]),
    ],
)
def test_the_best_approximation_of_the_mean_product(num_devices, ranks):
    uploads = sent(num_devices, ranks)
    found = after(uploads)
    u, values, vt = np.linalg.svd(mean_products(uploads))
    best = (u[..., :RANK] * values[:, None, :RANK]) @ vt[:, :RANK]
    assert np.abs(found["lora_B.q"] @ found["lora_A.q"] - best).max() < 1e-6 * values.max()
    for layer in range(LAYERS):
        a, b = found["lora_A.q"][layer], found["lora_B.q"][layer]
        assert a @ a.T == pytest.approx(np.eye(RANK), abs=1e-6)
        assert np.linalg.norm(b, axis=0) == pytest.approx(values[layer, :RANK], rel=1e-6)
    heads = [LAYOUT.views(vector)["head.weight"] for vector in uploads.params]
    assert found["head.weight"] == pytest.approx(np.average(heads, axis=0, weights=uploads.weights), abs=1e-6)


def test_two_devices_by_hand():
    """One changes the first output by 4 times the first input, the other the second by 2 times the second."""
    b = np.array([[[4], [0]], [[0], [2]]], np.float32)
    a = np.array([[[1, 0, 0]], [[0, 1, 0]]], np.float32)
    # the mean is diag(2, 1), whose leading component is the first device's
    found_b, found_a = leading(b, a, np.array([0.5, 0.5]))
    assert found_b == pytest.approx(np.array([[2], [0]]))
    assert found_a == pytest.approx(np.array([[1, 0, 0]]))
    # with weights 1/4 and 3/4 it is diag(1, 1.5): the second's
    found_b, found_a = leading(b, a, np.array([0.25, 0.75]))
    assert found_b == pytest.approx(np.array([[0], [1.5]]))
    assert found_a == pytest.approx(np.array([[0, 1, 0]]))


def test_devices_that_agree_keep_their_product():
    uploads = sent(1)
    again = RoundUploads(**{**vars(uploads), "params": [uploads.params[0]] * 1})
    found = after(again)
    assert found["lora_B.q"] @ found["lora_A.q"] == pytest.approx(mean_products(again), abs=1e-5)


def test_the_order_of_the_uploads_does_not_matter():
    uploads = sent(3)
    turned = RoundUploads(
        device_ids=uploads.device_ids[::-1].copy(),
        num_examples=uploads.num_examples[::-1].copy(),
        counts=uploads.counts[::-1].copy(),
        num_steps=uploads.num_steps,
        params=uploads.params[::-1],
        device_learning_rate=0.1,
    )
    one, other = after(uploads), after(turned)
    assert all(np.array_equal(one[name], other[name]) for name in one)


def test_no_change_stays_none():
    uploads = sent(2)
    for vector in uploads.params:
        LAYOUT.views(vector)["lora_B.q"][...] = 0
    found = after(uploads)
    assert not found["lora_B.q"].any()
    assert np.isfinite(found["lora_A.q"]).all()
