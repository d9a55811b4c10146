import numpy as np
import pytest
import torch
from backbones import (
    HIDDEN_SIZE,
    NUM_LAYERS,
    NUM_TOKENS,
    load_backbone,
    make_batch,
    read_tuning,
    save_backbone,
    with_prompts,
)
from torch.nn import functional

from fedhpc.tuning.base import as_parameters, linear_heads

CPU = torch.device("cpu")
WIDTH = 16
"""D of llama-gqa: 2 key-value heads of 8."""
HEAD_SIZE = 3 * HIDDEN_SIZE + 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_backbone(tmp_path_factory.mktemp("tuning"), "llama-gqa", initializer_range=0.125)


def numbered(tuning):
    """Every number of every tensor is another one."""
    tensors, first = {}, 0
    for name, shape in {**tuning.per_layer, **tuning.shared}.items():
        size = int(np.prod(shape))
        tensors[name] = np.arange(first, first + size, dtype=np.float32).reshape(shape)
        first += size
    return tensors


@pytest.mark.parametrize("head", ["verbalizer", "linear"])
@pytest.mark.parametrize("layers", [(0,), (1,), (0, 2), (0, 1, 2)])
def test_split_and_merge_are_inverse(folder, head, layers):
    tuning = read_tuning(folder, head=head)
    tensors = numbered(tuning)
    exchanged, local = tuning.split(tensors, layers)
    per_layer, shared = 2 * NUM_TOKENS * WIDTH, HEAD_SIZE if head == "linear" else 0
    assert exchanged.size == tuning.exchanged(layers).size == len(layers) * per_layer + shared
    assert local.size == tuning.local(layers).size == (NUM_LAYERS - len(layers)) * per_layer
    merged = tuning.merge(exchanged, local, layers)
    assert merged.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(merged[name], tensor)
    exchanged[:] = -1
    local[:] = -1
    assert all((merged[name] >= 0).all() for name in merged)


def test_exchanged_prompts_are_those_of_the_selected_layers(folder):
    tuning = read_tuning(folder)
    prompts = numbered(tuning)["prompts"]
    exchanged, local = tuning.split({"prompts": prompts}, (0, 2))
    np.testing.assert_array_equal(exchanged.reshape(2, 2, NUM_TOKENS, WIDTH), prompts[[0, 2]])
    np.testing.assert_array_equal(local.reshape(1, 2, NUM_TOKENS, WIDTH), prompts[[1]])


@pytest.mark.parametrize("head", ["verbalizer", "linear"])
def test_kept_elements_narrow_the_vector_of_all_layers(folder, head):
    tuning = read_tuning(folder, head=head)
    everything, _ = tuning.split(numbered(tuning), (0, 1, 2))
    for layers in [(1,), (0, 2), (0, 1, 2)]:
        narrow, _ = tuning.split(numbered(tuning), layers)
        np.testing.assert_array_equal(everything[tuning.kept_elements(layers)], narrow)


def test_initial_tensors_are_normal_and_fixed_by_the_seed(folder):
    tuning = read_tuning(folder, num_tokens=200, head="linear")
    tensors, again, other = tuning.initial(1), tuning.initial(1), tuning.initial(2)
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        "prompts": (NUM_LAYERS, 2, 200, WIDTH),
        "head.weight": (3, HIDDEN_SIZE),
        "head.bias": (3,),
    }
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(np.float32)}
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor, again[name])
    assert not np.isclose(tensors["prompts"], other["prompts"]).mean() > 0.01
    # 19200 draws: the mean's standard error is 0.125 / 139, the deviation's 0.5 % of it.
    assert abs(tensors["prompts"].mean()) < 0.004
    assert tensors["prompts"].std() == pytest.approx(0.125, rel=0.03)
    assert tensors["head.weight"].std() == pytest.approx(0.125, rel=0.3)
    assert not tensors["head.bias"].any()


@pytest.mark.parametrize("offset", [True, False])
def test_forward_is_the_backbones_score_behind_the_prompts(folder, offset):
    tuning, backbone = read_tuning(folder, position_offset=offset), load_backbone(folder, "llama-gqa")
    params, batch = as_parameters(tuning.initial(1), CPU), make_batch("llama-gqa")
    expected = backbone.word_scores(batch, with_prompts(params["prompts"], NUM_TOKENS if offset else 0))
    scores = tuning.forward(backbone, [params], batch)
    assert torch.equal(scores, expected)
    losses = functional.cross_entropy(expected, batch.labels, reduction="none")
    assert torch.equal(tuning.losses(scores, batch.labels), losses)


def test_linear_head_scores_the_mean_hidden_state_of_the_text(folder):
    tuning, backbone = read_tuning(folder, head="linear"), load_backbone(folder, "llama-gqa", head="linear")
    params, batch = as_parameters(tuning.initial(1), CPU), make_batch("llama-gqa", (9, 4, 7))
    with torch.no_grad():
        params["head.bias"].copy_(torch.tensor([1.0, 2.0, 3.0]))
        hidden = backbone.hidden(batch, with_prompts(params["prompts"], NUM_TOKENS))
        scores = tuning.forward(backbone, [params], batch)
    for row, length in enumerate((9, 4, 7)):
        pooled = hidden[row, :length].mean(0)
        expected = params["head.weight"] @ pooled + params["head.bias"]
        torch.testing.assert_close(scores[row], expected)
        torch.testing.assert_close(
            linear_heads([params], pooled[None].bfloat16(), [1])[0], expected, rtol=0.05, atol=0.05
        )
    losses = tuning.losses(tuning.forward(backbone, [params], batch), batch.labels)
    gradients = torch.autograd.grad(losses.sum(), list(params.values()))
    assert all(gradient.any() for gradient in gradients)


def test_vocabulary_loss_is_minus_the_labels_log_probability(folder):
    tuning = read_tuning(folder, loss="vocabulary")
    scores = torch.tensor([[-1.0, -2.0, -3.0], [-4.0, -5.0, -6.0]])
    assert tuning.losses(scores, torch.tensor([2, 0])).tolist() == [3.0, 4.0]


def test_prompt_dropout_acts_in_training_alone_and_keeps_the_expected_value(folder):
    tuning, backbone = read_tuning(folder, dropout=0.5), load_backbone(folder, "llama-gqa")
    params, batch, seen = as_parameters(tuning.initial(1), CPU), make_batch("llama-gqa"), []
    backbone.word_scores = lambda _batch, overlay: seen.append(torch.stack(overlay.prompts, dim=1))
    tuning.forward(backbone, [params], batch)
    tuning.forward(backbone, [params], batch, dropout_seeds=[5])
    assert torch.equal(seen[0], params["prompts"][None])
    kept = seen[1] != 0
    assert 0.3 < kept.float().mean() < 0.7
    assert torch.equal(seen[1][kept], 2 * params["prompts"][None][kept])


def test_parameters_are_trainable_copies(folder):
    tensors = read_tuning(folder).initial(1)
    params = as_parameters(tensors, CPU)
    with torch.no_grad():
        params["prompts"].zero_()
    assert params["prompts"].requires_grad
    assert tensors["prompts"].any()
