"""Prepacked weights: what is computed with them, by them alone; where they cannot be had."""

import pytest
import torch
from backbones import describe, load_backbone, make_batch, random_prompts, save_backbone, with_prompts
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedhpc.config.sections import ModelConfig, TuningConfig
from fedhpc.errors import ModelError
from fedhpc.model import prepacking
from fedhpc.model.backbone import Backbone
from fedhpc.model.prepacking import prepacked_bytes

NAMES = ("bert", "gpt2", "llama-gqa")


def loss_at(backbone, prompts, batch):
    return functional.cross_entropy(backbone.word_scores(batch, with_prompts(prompts)), batch.labels)


def results(backbone, batch):
    """Scores, a gradient, and its gradient."""
    prompts = random_prompts(backbone.base.config).requires_grad_()
    scores = backbone.word_scores(batch, with_prompts(prompts))
    with sdpa_kernel(SDPBackend.MATH):  # the others are differentiated once
        (gradient,) = torch.autograd.grad(loss_at(backbone, prompts, batch), prompts, create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), prompts)
    return scores, gradient, second


@pytest.mark.parametrize("name", NAMES)
def test_scores_and_both_gradients_are_the_models_own(tmp_path, name):
    path, batch = save_backbone(tmp_path, name), make_batch(name)
    plain, prepacked = (load_backbone(path, name, prepack_weights=on) for on in (False, True))
    for ours, theirs in zip(results(prepacked, batch), results(plain, batch), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_in_the_layers_reads_the_weights_as_they_were(tmp_path, name):
    path, batch = save_backbone(tmp_path, name), make_batch(name)
    backbone = load_backbone(path, name, prepack_weights=True)
    before = results(backbone, batch)
    held = 0
    for key, weight in load_backbone(path, name).base.named_parameters():
        if weight.dim() == 2 and "embed" not in key and not key.endswith(("wte.weight", "wpe.weight")):
            backbone.base.get_parameter(key).data.fill_(torch.nan)
            held += 2 * weight.nbytes
    assert prepacked_bytes(backbone.base) == held
    for first, second in zip(before, results(backbone, batch), strict=True):
        assert torch.equal(first, second)


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU has no instructions for it")
def test_the_gradient_of_16_bits_is_that_of_plain_ones(tmp_path):
    path, batch = save_backbone(tmp_path, "llama-gqa"), make_batch("llama-gqa")
    found = []
    for on in (False, True):
        backbone = load_backbone(path, "llama-gqa", dtype="bfloat16", prepack_weights=on)
        prompts = random_prompts(backbone.base.config).requires_grad_()
        found += torch.autograd.grad(loss_at(backbone, prompts, batch), prompts)
    assert (found[1] - found[0]).norm() < 0.05 * found[0].norm()


def test_activations_are_recomputed_with_them(tmp_path):
    path, batch = save_backbone(tmp_path, "llama-gqa"), make_batch("llama-gqa")
    found = []
    for recomputed in (False, True):
        backbone = load_backbone(path, "llama-gqa", prepack_weights=True, gradient_checkpointing=recomputed)
        backbone.training_mode(True)
        prompts = random_prompts(backbone.base.config).requires_grad_()
        found += torch.autograd.grad(loss_at(backbone, prompts, batch), prompts)
    assert torch.equal(*found)


def test_an_output_may_be_changed_in_place(tmp_path):
    """As some models do."""
    backbone = load_backbone(save_backbone(tmp_path, "llama-gqa"), "llama-gqa", prepack_weights=True)
    module = backbone.base.layers[0].self_attn.q_proj
    inputs = torch.randn(2, 3, module.in_features, requires_grad=True)
    (gradient,) = torch.autograd.grad(module(inputs).mul_(2).sum(), inputs)
    torch.testing.assert_close(gradient, 2 * module.weight.sum(0).expand_as(inputs))


def test_where_pytorch_cannot_it_is_said(tmp_path, monkeypatch):
    def refuse(*_):
        raise RuntimeError("mkldnn is not available\nhere")

    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", refuse)
    message = "model.prepack_weights: true: PyTorch cannot .* torch.float32 on this CPU: mkldnn is not available; leave"
    with pytest.raises(ModelError, match=message):
        load_backbone(save_backbone(tmp_path, "bert"), "bert", prepack_weights=True)


def test_a_model_without_plain_linear_modules_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(prepacking, "_linears", lambda model: [])
    with pytest.raises(ModelError, match="a bert model has no plain linear modules; leave the key out"):
        load_backbone(save_backbone(tmp_path, "bert"), "bert", prepack_weights=True)


def test_on_a_gpu_it_is_refused_before_anything_is_loaded():
    config = ModelConfig(name="nowhere", prepack_weights=True)
    with pytest.raises(ModelError, match="is for CPUs, and this rank computes on cuda:1; leave the key out"):
        Backbone(config, TuningConfig(), describe("bert"), torch.device("cuda:1"))


def test_the_plan_counts_them(run_config, fedhpc):
    status, out, _ = fedhpc("plan", run_config(), "--ranks", 2, "--set", "model.prepack_weights=true")
    assert (status, "backbone, prepacked" in out) == (0, True)
