"""Texts one behind the other give the numbers of padded texts, and no layer computes padding."""

from dataclasses import replace
from itertools import pairwise

import architectures
import numpy as np
import pytest
import torch
from backbones import (
    DECODERS,
    ENCODERS,
    LONG_WORDS,
    NUM_LAYERS,
    NUM_TOKENS,
    load_backbone,
    make_batch,
    read_tuning,
    save_backbone,
)
from torch import nn

from fedhpc.model.backbone import Backbone
from fedhpc.model.rows import groups_of

LENGTHS = (9, 4, 7, 1, 9, 2, 12, 5)
SIZES = (3, 1, 4)
KINDS = ["prompt", "lora", "adapter", "prompt_tuning", "late_prompt"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    for name in (*ENCODERS, *DECODERS, "opt"):
        save_backbone(folder, name)
    return folder


def tuned(folder, name, kind, *, lengths=LENGTHS, sizes=SIZES, **more):
    """A float64 backbone, a tuning, parameters of each device, and a batch."""
    backbone = load_backbone(folder / name, name, kind=kind, longest=max(lengths), **more).double()
    assert backbone._in_rows
    tuning = read_tuning(folder / name, kind=kind, head=more.get("head", "verbalizer"))
    rng = torch.Generator().manual_seed(5)
    params = [
        {
            key: (0.3 * torch.randn(size, generator=rng, dtype=torch.float64)).requires_grad_()
            for key, size in tuning.shapes.items()
        }
        for _ in sizes
    ]
    return backbone, tuning, params, replace(make_batch(name, lengths), sizes=sizes)


def gradients(backbone, tuning, params, batch):
    loss = tuning.losses(tuning.forward(backbone, params, batch), batch.labels).mean()
    return torch.autograd.grad(loss, [tensor for own in params for tensor in own.values()])


def assert_as_padded(backbone, *work):
    found = gradients(backbone, *work)
    with backbone._padded():
        expected = gradients(backbone, *work)
    usual = max(float(gradient.abs().max()) for gradient in expected)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6 * usual)


@pytest.mark.parametrize("name", [*ENCODERS, *DECODERS, "opt"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_padded_texts(folder, name, kind):
    assert_as_padded(*tuned(folder, name, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_with_class_words_of_several_tokens_too(folder, kind):
    assert_as_padded(*tuned(folder, "llama-gqa", kind, words=LONG_WORDS))


@pytest.mark.parametrize("name", ["bert", "qwen3"])
@pytest.mark.parametrize("kind", KINDS)
def test_with_a_linear_head_too(folder, name, kind):
    assert_as_padded(*tuned(folder, name, kind, head="linear"))


@pytest.mark.parametrize("name", ["bert", "gpt2", "opt", "llama-gqa"])
def test_all_texts_together_may_be_longer_than_a_text_may(folder, name):
    lengths = LENGTHS * 3
    assert sum(lengths) > 2 * 64  # the backbones' positions
    assert_as_padded(*tuned(folder, name, "prompt", lengths=lengths, sizes=(12, 12)))


@pytest.mark.parametrize("kind", ["prompt", "lora", "prompt_tuning"])
def test_texts_longer_than_a_sliding_window(tmp_path, kind):
    save_backbone(tmp_path, "mistral", sliding_window=6)
    assert_as_padded(*tuned(tmp_path, "mistral", kind))


@pytest.mark.parametrize("kind", KINDS)
def test_no_layer_computes_padding(folder, kind):
    backbone, *work = tuned(folder, "llama-gqa", kind)
    counts = []
    for layer in backbone._layers:
        for module in layer.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(
                    lambda module, inputs, output: counts.append(inputs[0].numel() // inputs[0].shape[-1])
                )
    gradients(backbone, *work)
    soft_tokens = NUM_TOKENS * len(LENGTHS) if kind in ("prompt_tuning", "late_prompt") else 0
    assert set(counts) == {sum(LENGTHS) + soft_tokens, len(LENGTHS)}  # the last layer is computed at the slots
    assert counts.count(len(LENGTHS)) < len(counts) / NUM_LAYERS


@pytest.mark.parametrize("name", ["falcon", "stablelm"])
def test_a_model_whose_attention_does_not_take_part_computes_padding(tmp_path, name):
    path = architectures.save_architecture(tmp_path, name, vocab_size=101)
    assert not load_backbone(path, "llama", kind="prompt_tuning")._in_rows


def test_a_model_that_computes_something_else_so_is_padded(folder, monkeypatch):
    monkeypatch.setattr("fedhpc.model.rows.Rows._mask", lambda rows, group, sight, may_skip: None)
    assert not load_backbone(folder / "bert", "bert")._in_rows


def test_every_architecture_of_the_documentation_but_these_needs_no_padding(tmp_path):
    padded = {
        name
        for number, name in enumerate([*architectures.ENCODERS, *architectures.DECODERS])
        if not any_backbone(
            architectures.save_architecture(tmp_path / str(number), name, vocab_size=101), name
        )._in_rows
    }
    assert padded == {"falcon", "falcon, alibi", "stablelm"}


def any_backbone(path, name) -> Backbone:
    kind = "bert" if name in architectures.ENCODERS else "llama"
    return load_backbone(path, kind, kind="prompt_tuning")


@pytest.mark.parametrize("call_cost", [0.0, 10.0, 300.0, 1e9])
@pytest.mark.parametrize("seed", range(5))
def test_groups_cost_least(seed, call_cost):
    """Against all ways to cut the sorted texts."""
    rng = np.random.default_rng(seed)
    lengths, prompts = rng.integers(1, 30, 9), int(rng.integers(0, 20))

    def cost(groups):
        return sum(call_cost + len(g) * max(lengths[g]) * (max(lengths[g]) + prompts) for g in groups)

    order = np.argsort(lengths, kind="stable")
    ways = ([b for b in range(1, 9) if bits >> b & 1] for bits in range(0, 512, 2))
    least = min(cost([order[i:j] for i, j in pairwise([0, *cuts, 9])]) for cuts in ways)
    found = groups_of(lengths, prompts, call_cost)
    assert sorted(np.concatenate(found)) == list(range(9))
    assert cost(found) == pytest.approx(least)
