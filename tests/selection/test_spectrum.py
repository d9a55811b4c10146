import math

import numpy as np
import pytest
import torch
from backbones import (
    cached_logits,
    load_backbone,
    load_plain,
    make_batch,
    read_tuning,
    save_backbone,
)
from torch.nn import functional

from fedhpc.selection import spectrum
from fedhpc.selection.spectrum import (
    BatchLoss,
    density_ratio,
    eigengap_ratio,
    lanczos,
    lipschitz_constant,
    lossless_ratio,
)

FLAT_WORDS = [7, 41, 90]


def random_symmetric(size, seed=0):
    matrix = np.random.default_rng(seed).standard_normal((size, size))
    return matrix + matrix.T


def test_lanczos_with_all_steps_finds_the_whole_spectrum():
    matrix, start = random_symmetric(30), np.random.default_rng(1).standard_normal(30)
    values, weights = lanczos(lambda v: matrix @ v, start, steps=30)
    expected, vectors = np.linalg.eigh(matrix)
    np.testing.assert_allclose(values, expected, atol=1e-9)
    np.testing.assert_allclose(weights, (vectors.T @ (start / np.linalg.norm(start))) ** 2, atol=1e-9)
    assert weights.sum() == pytest.approx(1)


def test_lanczos_with_few_steps_finds_the_extremes_of_a_clustered_spectrum():
    # Without re-orthogonalisation the outer eigenvalues would come back several times.
    basis = np.linalg.qr(random_symmetric(200))[0]
    expected = np.concatenate([np.linspace(0, 1, 196), [-50.0, 100.0, 200.0, 300.0]])
    matrix = basis @ np.diag(expected) @ basis.T
    values, _ = lanczos(lambda v: matrix @ v, np.random.default_rng(1).standard_normal(200), steps=40)
    assert len(values) == 40
    np.testing.assert_allclose(values[[0, -3, -2, -1]], [-50, 100, 200, 300], rtol=1e-9)
    assert ((values > -1) & (values < 2)).sum() == 36


def test_lanczos_ends_where_the_start_spans_no_more():
    matrix = np.diag([1.0, 2.0, 3.0, 4.0])
    values, weights = lanczos(lambda v: matrix @ v, np.array([3.0, 0.0, 4.0, 0.0]), steps=4)
    np.testing.assert_allclose(values, [1, 3])
    np.testing.assert_allclose(weights, [9 / 25, 16 / 25])
    values, weights = lanczos(np.zeros_like, np.ones(4), steps=4)
    np.testing.assert_allclose((values, weights), [[0], [1]], atol=1e-12)


def test_eigengap_takes_the_first_gap_wider_than_four_lipschitz_constants():
    values, weights = np.array([0.0, 0.1, 0.2, 3.0, 9.0]), np.array([0.1, 0.2, 0.3, 0.25, 0.15])
    for lipschitz, ratio, gap in ((0.5, 0.6, 2.8), (1.0, 0.85, 6.0), (0.01, 0.1, 0.1), (1.5, 1.0, 6.0)):
        found = eigengap_ratio(values, weights, lipschitz)
        assert (found.ratio, found.gap, found.lipschitz) == (pytest.approx(ratio), pytest.approx(gap), lipschitz)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7, 0.9, 0.99])
def test_eigengap_finds_the_share_of_eigenvalues_below_a_known_gap(share):
    """By 50 Lanczos steps: their number up to the gap says little about it."""
    size, rng = 32768, np.random.default_rng(2)
    below = round(share * size)
    spectrum = np.concatenate([rng.uniform(-0.1, 0.1, below), rng.uniform(3.0, 3.2, size - below)])
    values, weights = lanczos(lambda v: spectrum * v, rng.standard_normal(size), steps=50)
    assert eigengap_ratio(values, weights, 0.25).ratio == pytest.approx(share, abs=0.02)


def density_in_words(values, weights):
    """The ratio as the design's section 3 describes it: an independent reading, by loops."""
    low, high = min(values) - 0.01, max(values) + 0.01
    points = [low + (high - low) * i / 9999 for i in range(10000)]
    variance = 1e-5 * max(1, high - low)
    heights = np.zeros(10000)
    for value, weight in zip(values, weights, strict=True):
        heights += weight * np.exp(-((np.array(points) - value) ** 2) / (2 * variance)) / np.sqrt(2 * np.pi * variance)
    area = heights.sum() * (points[1] - points[0])

    def mass(t):
        cells = sum(1 for right in points[1:] if right <= t)
        return 1 - heights[:cells].sum() * (points[1] - points[0]) / area

    step = 0.1
    for _ in range(60):
        found = []
        while not found or found[-1] >= found[0] / 2:
            found.append(mass(len(found) * step))
            last = found[-4:]
            if (
                found[-1] >= found[0] / 2
                and len(last) == 4
                and all(abs(last[i + 1] - last[i]) < 0.005 for i in range(3))
            ):
                return found[-1], found[0]
        step /= 2
    raise AssertionError("no end")


def spectra():
    """Ten: eigenvalues of which Lanczos makes Ritz values and weights, or two points by themselves."""
    rng = np.random.default_rng(7)
    yield "bulk with outliers", np.concatenate([rng.normal(0, 0.02, 2000), [1.0, 3.0, 8.0]])
    yield "bulk above 0 with outliers", np.concatenate([np.abs(rng.normal(0, 0.1, 2000)), [2.0, 5.0]])
    yield "exponential", rng.exponential(0.3, 2000)
    yield "exponential, small", rng.exponential(0.01, 2000)
    yield "Laplace", rng.laplace(0, 0.2, 2000)
    yield "Laplace, wide", rng.laplace(0.5, 2.0, 2000)
    yield "uniform", rng.uniform(-1, 3, 2000)
    yield "below 0", -rng.exponential(0.3, 500)
    yield "two points", np.array([-1.0, 2.0])
    yield "two points, near", np.array([0.05, 2.0])


@pytest.mark.parametrize(("name", "spectrum"), [*spectra()], ids=lambda value: value if isinstance(value, str) else "")
def test_density_agrees_with_an_independent_reading_of_its_description(name, spectrum):
    rng = np.random.default_rng(0)
    steps = min(50, spectrum.size)
    values, weights = lanczos(lambda v: spectrum * v, rng.standard_normal(spectrum.size), steps=steps)
    found = density_ratio(values, weights)
    assert (found.ratio, found.mass) == pytest.approx(density_in_words(values, weights), abs=1e-6)


@pytest.mark.parametrize("rate", [1e-12, 0.05], ids=["before training", "after training"])
def test_density_agrees_on_the_hessian_of_a_run(fedhpc, run_config, monkeypatch, rate):
    found = []

    def noting(values, weights):
        found.append((values, weights, density_ratio(values, weights)))
        return found[-1][-1]

    monkeypatch.setattr(spectrum, "density_ratio", noting)
    config = run_config(selection={"ratio": "auto", "warmup_rounds": 2}, device__learning_rate=rate)
    assert fedhpc("run", config)[0] == 0
    assert len(found) == 6  # the devices of a round
    for values, weights, ratio in found[:2]:
        assert (ratio.ratio, ratio.mass) == pytest.approx(density_in_words(values, weights), abs=1e-6)


def test_density_begins_again_from_zero_with_half_the_step():
    # Steps of 0.1: mass 1, then 0.4, less than half. Of 0.05: 1, 0.7 (half of the first), 0.4.
    # Of 0.025: 1, 1, 0.7 and so on; from 0 with 0.0125 four masses of 1 follow each other.
    found = density_ratio(np.array([0.05, 2.0]), np.array([0.6, 0.4]))
    assert (found.ratio, found.mass) == (pytest.approx(1.0, abs=1e-3), pytest.approx(1.0))
    # 0.8 at 0 to 0.2, 0.65 at 0.3 (half of that eigenvalue), then 0.5; of the outer two the grid ends 0.01 beyond.
    inside = 0.5 + 0.5 * math.erf(0.01 / math.sqrt(2e-5 * 3.02))
    expected = 0.5 * inside / (0.7 * inside + 0.3)
    found = density_ratio(np.array([-1.0, 0.3, 2.0]), np.array([0.2, 0.3, 0.5]))
    assert found.ratio == pytest.approx(expected, abs=1e-3)
    assert density_ratio(np.array([-1.0, 2.0]), np.array([0.7, 0.3])).ratio == pytest.approx(0.3, abs=1e-4)


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1.0, 1e6, 1e12])
def test_density_always_ends_with_a_share(scale):
    rng = np.random.default_rng(3)
    for size in (1, 2, 5, 50):
        for shift in (-3, 0, 3):
            values = np.sort(rng.standard_normal(size) + shift) * scale
            assert 0 <= density_ratio(values, rng.dirichlet(np.ones(size))).ratio <= 1
    assert density_ratio(np.full(3, -1 - scale), np.full(3, 1 / 3)).ratio < 1e-3


class Cubic:
    """F(x) = sum of a x^3 / 6 at P: H(P + d) = diag(a (P + d)), so |H(P + d) - H(P)| = max |a d|."""

    size, norm = 1024, 10.0
    steepness = np.array([5.0, *np.linspace(0.001, 0.1, 1023)])

    def hessian_product(self, vector):
        return self.steepness * (self.norm / 32) * vector

    def hessian_at(self, displacement):
        return lambda vector: self.steepness * (self.norm / 32 + displacement) * vector


def test_lipschitz_constant_is_of_the_order_of_the_supremum():
    # |d| = 0.1 * 10 along the first axis: 5. Random directions have about 5 / 32 there.
    assert lipschitz_constant(Cubic(), np.random.default_rng(0)) == pytest.approx(5, rel=0.05)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spectrum")
    return {name: save_backbone(folder, name, num_hidden_layers=2) for name in ("roberta", "llama-gqa")}


def batch_loss(path, name, **tuning):
    tuning = read_tuning(path, num_tokens=1, **tuning)
    backbone = load_backbone(path, name, head=tuning.config.head)
    tensors = tuning.initial(1)
    return BatchLoss(backbone, tuning, tensors, make_batch(name), lambda: None), tensors


def test_gradient_and_hessian_products_equal_those_of_the_whole_hessian(folders):
    loss, tensors = batch_loss(folders["llama-gqa"], "llama-gqa")
    plain, batch = load_plain(folders["llama-gqa"], "llama-gqa"), make_batch("llama-gqa")
    start = torch.from_numpy(tensors["prompts"]).double()
    assert loss.size == start.numel() == 64
    assert loss.norm == pytest.approx(start.norm().item())

    def reference(flat):
        logits = cached_logits(plain, batch.input_ids, batch.attention_mask, flat.view_as(start))
        return functional.cross_entropy(logits[torch.arange(3), batch.slots][:, FLAT_WORDS], batch.labels)

    rng = np.random.default_rng(0)
    displacement = 0.3 * rng.standard_normal(64)
    moved = start.flatten() + torch.from_numpy(displacement)
    hessian, there = (torch.autograd.functional.hessian(reference, at).numpy() for at in (start.flatten(), moved))
    vector = rng.standard_normal(64)
    expected = there @ vector
    assert np.linalg.norm(loss.hessian_at(displacement)(vector) - expected) < 1e-4 * np.linalg.norm(expected)
    expected = hessian @ vector
    for scale in (1, 1e-3, 1e3):
        product = loss.hessian_product(scale * vector) / scale
        assert np.linalg.norm(product - expected) < 1e-4 * np.linalg.norm(expected)

    values, _ = lanczos(loss.hessian_product, vector, steps=40)
    np.testing.assert_allclose(values[[0, -1]], np.linalg.eigvalsh(hessian)[[0, -1]], rtol=1e-4)


def test_only_what_is_trained_moves(folders):
    loss, tensors = batch_loss(folders["llama-gqa"], "llama-gqa", kind="ffa_lora", rank=2)
    assert loss.size == sum(tensor.size for name, tensor in tensors.items() if name.startswith("lora_B."))
    assert np.abs(loss.hessian_product(np.ones(loss.size))).max() > 0


@pytest.mark.parametrize("head", ["verbalizer", "linear"])
@pytest.mark.parametrize("name", ["roberta", "llama-gqa"])
@pytest.mark.parametrize("by", ["eigengap", "density"])
def test_lossless_ratio_of_encoders_and_decoders(folders, name, by, head):
    tuning = read_tuning(folders[name], num_tokens=2, head=head)
    backbone, batch = load_backbone(folders[name], name, head=head), make_batch(name)
    tensors = tuning.initial(1)
    before, beats = {key: tensor.copy() for key, tensor in tensors.items()}, []

    def ratio():
        rng = np.random.default_rng(5)
        return lossless_ratio(backbone, tuning, tensors, batch, by=by, rng=rng, beat=lambda: beats.append(by))

    loss, rng = BatchLoss(backbone, tuning, tensors, batch, lambda: None), np.random.default_rng(5)
    start = rng.standard_normal(loss.size)
    values, weights = lanczos(loss.hessian_product, start, steps=50)
    expected = density_ratio(values, weights)
    if by == "eigengap":
        expected = eigengap_ratio(values, weights, lipschitz_constant(loss, rng))
    np.testing.assert_equal(vars(ratio()), vars(expected))
    assert 0 < expected.ratio <= 1
    # A gradient and 50 products; for the eigengap three gradients and 10 + 3 * 2 * 10 products more.
    assert len(beats) == (51 if by == "density" else 51 + 73)
    assert all(np.array_equal(tensors[key], before[key]) for key in tensors)
