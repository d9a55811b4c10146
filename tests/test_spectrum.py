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

from fedhpc.spectrum import (
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
    values = np.array([0.0, 0.1, 0.2, 3.0, 9.0])
    assert eigengap_ratio(values, 0.5) == 3 / 5
    assert eigengap_ratio(values, 1.0) == 4 / 5
    assert eigengap_ratio(values, 0.01) == 1 / 5
    assert eigengap_ratio(values, 1.5) == 1.0  # gaps of at most 6


def test_density_is_the_mass_above_the_threshold_once_it_is_flat():
    # Steps of 0.1, smoothing 0.0055: the mass is 0.8 at 0 to 0.2, 0.65 at 0.3 (half of that eigenvalue), then 0.5.
    assert density_ratio(np.array([-1.0, 0.3, 2.0]), np.array([0.2, 0.3, 0.5])) == pytest.approx(0.5, abs=1e-6)
    # Flat from the start.
    assert density_ratio(np.array([-1.0, 2.0]), np.array([0.7, 0.3])) == pytest.approx(0.3, abs=1e-6)


def test_density_never_falls_below_half_of_the_mass_above_zero():
    # The step over 0.05 would leave 0.4 of 1; halved again and again it ends on the flank, just above 0.5.
    ratio = density_ratio(np.array([0.05, 2.0]), np.array([0.6, 0.4]))
    assert 0.5 <= ratio <= 0.51


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1.0, 1e6])
def test_density_always_ends_with_a_share(scale):
    rng = np.random.default_rng(3)
    for size in (1, 2, 5, 50):
        for shift in (-3, 0, 3):
            values = np.sort(rng.standard_normal(size) + shift) * scale
            weights = rng.dirichlet(np.ones(size))
            assert 0 <= density_ratio(values, weights) <= 1 + 1e-12
    assert density_ratio(np.zeros(5), np.full(5, 0.2)) <= 0.5
    assert density_ratio(np.full(3, -scale), np.full(3, 1 / 3)) <= 0.5


class Cubic:
    """F(x) = sum of x^3 / 6 at P = 10: grad F(P + d) = (P + d)^2 / 2, H(P) v = P v, so B(d) = -(P^2 + d^2) / 2."""

    size, norm = 1, 10.0

    def gradient(self, displacement):
        return (10 + displacement) ** 2 / 2

    def hessian_product(self, vector):
        return 10 * vector


def test_lipschitz_constant_is_the_steepest_change_of_the_linearisation_error():
    # |B(d) - B(0)| / |d| = |d| / 2 with |d| = 0.1 * 10.
    assert lipschitz_constant(Cubic(), np.random.default_rng(0)) == pytest.approx(0.5)


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
    moved = (start.flatten() + torch.from_numpy(displacement)).requires_grad_()
    (wanted,) = torch.autograd.grad(reference(moved), moved)
    np.testing.assert_allclose(loss.gradient(displacement), wanted, rtol=1e-3, atol=1e-5)

    hessian = torch.autograd.functional.hessian(reference, start.flatten()).numpy()
    vector = rng.standard_normal(64)
    expected = hessian @ vector
    for scale in (1, 1e-3, 1e3):
        product = loss.hessian_product(scale * vector) / scale
        assert np.linalg.norm(product - expected) < 1e-4 * np.linalg.norm(expected)

    values, _ = lanczos(loss.hessian_product, vector, steps=40)
    np.testing.assert_allclose(values[[0, -1]], np.linalg.eigvalsh(hessian)[[0, -1]], rtol=1e-4)


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
    expected = (
        density_ratio(values, weights) if by == "density" else eigengap_ratio(values, lipschitz_constant(loss, rng))
    )
    assert ratio() == ratio() == expected
    assert 0 < expected <= 1
    # 50 products; for the eigengap five gradients and four products more.
    assert len(beats) == 2 * (50 if by == "density" else 59)
    assert all(np.array_equal(tensors[key], before[key]) for key in tensors)
