"""The last layer at the answer slots alone gives the numbers of the whole layer."""

import gc

import pytest
import torch
from backbones import (
    DECODERS,
    ENCODERS,
    HIDDEN_SIZE,
    NUM_TOKENS,
    load_backbone,
    make_batch,
    random_prompts,
    save_backbone,
    with_prompts,
)
from torch.nn import functional


def scores_and_gradient(backbone, batch, prompts, first_position):
    prompts = prompts.detach().requires_grad_()
    scores = backbone.word_scores(batch, with_prompts(prompts, first_position))
    (gradient,) = torch.autograd.grad(functional.cross_entropy(scores, batch.labels), prompts)
    return scores, gradient


@pytest.mark.parametrize("lengths", [(9, 4, 7), (5, 5, 5), (3, 3)], ids=str)
@pytest.mark.parametrize("first_position", [0, NUM_TOKENS])
@pytest.mark.parametrize("name", [name for name in (*ENCODERS, *DECODERS) if name != "gpt2"])
def test_scores_and_gradients_are_those_of_the_whole_layer(tmp_path, name, lengths, first_position):
    backbone = load_backbone(save_backbone(tmp_path, name), name)
    batch, prompts = make_batch(name, lengths), random_prompts(backbone.base.config)
    seen = []
    layers = [module for module in backbone.base.modules() if type(module).__name__.endswith(("Layer", "Block"))]
    layers[-1].register_forward_hook(
        lambda module, inputs, output: seen.append((output[0] if isinstance(output, tuple) else output).numel())
    )
    narrow = scores_and_gradient(backbone, batch, prompts, first_position)
    assert seen == [len(lengths) * HIDDEN_SIZE]
    backbone._last_layer.restore()
    backbone._last_layer = None
    whole = scores_and_gradient(backbone, batch, prompts, first_position)
    assert seen[1] == sum(lengths) * HIDDEN_SIZE
    for ours, theirs in zip(narrow, whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_gpt2_insists_on_outputs_of_its_inputs_shape(tmp_path):
    assert load_backbone(save_backbone(tmp_path, "gpt2"), "gpt2")._last_layer is None


def test_no_activation_waits_for_the_garbage_collector(tmp_path):
    """A cycle of references would keep a batch's whole graph, and the next batch's would come on top."""
    backbone = load_backbone(save_backbone(tmp_path, "llama-gqa"), "llama-gqa")
    batch, prompts = make_batch("llama-gqa"), random_prompts(backbone.base.config)
    gc.collect()
    gc.disable()
    try:
        scores_and_gradient(backbone, batch, prompts, 0)
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        assert not [found for found in gc.garbage if isinstance(found, torch.Tensor)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


def test_recomputed_activations_are_the_same(tmp_path):
    path = save_backbone(tmp_path, "llama-gqa")
    plain, saving = (load_backbone(path, "llama-gqa", gradient_checkpointing=saving) for saving in (False, True))
    saving.training_mode(True)
    batch, prompts = make_batch("llama-gqa"), random_prompts(plain.base.config)
    assert saving._last_layer is not None
    for ours, theirs in zip(
        scores_and_gradient(saving, batch, prompts, 0), scores_and_gradient(plain, batch, prompts, 0), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_a_model_on_which_it_fails_keeps_its_whole_layer(tmp_path, monkeypatch):
    monkeypatch.setattr("fedhpc.model.last_layer.Memory.at_slots", lambda memory, tensor: tensor[:, :1])
    backbone = load_backbone(save_backbone(tmp_path, "bert"), "bert")
    assert backbone._last_layer is None
    batch, prompts = make_batch("bert"), random_prompts(backbone.base.config)
    broken = scores_and_gradient(backbone, batch, prompts, 0)
    monkeypatch.undo()
    intact = scores_and_gradient(load_backbone(save_backbone(tmp_path / "again", "bert"), "bert"), batch, prompts, 0)
    torch.testing.assert_close(broken, intact)
