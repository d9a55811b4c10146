"""The loss over trained tokens is that of transformers itself, whatever the chunks, padded or in rows."""

import numpy as np
import pytest
import torch
from backbones import DECODERS, VOCABULARY, load_backbone, load_plain, read_tuning, save_backbone

from fedhpc.data.prepared import Split
from fedhpc.model import token_loss

SPANS = [[(2, 5), (7, 9)], [(1, 4)], [(3, 12)], [(5, 6)]]
"""Trained tokens of four conversations; the first has two answers, the second is trained from its second token on."""
LENGTHS = (9, 4, 12, 7)
KINDS = ["prompt", "lora", "adapter", "prompt_tuning", "late_prompt"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("token_loss")
    for name in DECODERS:
        save_backbone(folder, name)
    return folder


def conversations():
    rng = np.random.default_rng(4)
    offsets = np.cumsum([0, *LENGTHS])
    spans = np.array(
        [edge + start for start, own in zip(offsets, SPANS, strict=False) for span in own for edge in span]
    )
    return Split(
        tokens=rng.integers(4, VOCABULARY, offsets[-1]).astype(np.int32),
        offsets=offsets,
        labels=np.zeros(4, np.int32),
        slots=np.array(LENGTHS) - 1,
        pad_id=1,
        spans=spans,
    )


def with_labels(batch):
    """As transformers wants it: a token's own number where it is trained, -100 elsewhere."""
    labels = torch.full_like(batch.input_ids, -100)
    for row, own in enumerate(SPANS):
        for begin, end in own:
            labels[row, begin:end] = batch.input_ids[row, begin:end]
    return labels


@pytest.mark.parametrize("name", DECODERS)
def test_loss_and_gradient_are_those_of_transformers(folder, name):
    batch, plain = conversations().batch(range(4)), load_plain(folder / name, name)
    embeddings = plain.get_input_embeddings()(batch.input_ids).detach().requires_grad_()
    expected = plain(
        inputs_embeds=embeddings, attention_mask=batch.attention_mask.long(), labels=with_labels(batch)
    ).loss
    (wanted,) = torch.autograd.grad(expected, embeddings)
    backbone = load_backbone(folder / name, name, head="language_model").double()
    with backbone.watched_embeddings() as seen:
        loss = backbone.token_losses(batch).mean()
        (found,) = torch.autograd.grad(loss, seen[-1])
    torch.testing.assert_close(loss.float(), expected, rtol=1e-6, atol=1e-6)  # transformers rounds the logits
    in_text = batch.attention_mask
    torch.testing.assert_close(found[in_text], wanted[in_text], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_devices_in_rows_have_the_gradients_of_padded_batches(folder, name, kind, monkeypatch):
    monkeypatch.setattr(token_loss, "CHUNK_ELEMENTS", 3 * VOCABULARY)
    backbone = load_backbone(folder / name, name, kind=kind, head="language_model").double()
    tuning = read_tuning(folder / name, kind=kind, head="language_model")
    rng = torch.Generator().manual_seed(5)
    params = [
        {
            key: (0.3 * torch.randn(size, generator=rng, dtype=torch.float64)).requires_grad_()
            for key, size in tuning.shapes.items()
        }
        for _ in range(2)
    ]
    batch = conversations().batch(range(4), (1, 3))
    assert batch.terms == (5, 13)

    def gradients():
        terms = tuning.loss_terms(backbone, params, batch)
        each = torch.stack([part.mean() for part in terms.split(batch.terms)])
        return torch.autograd.grad(each.sum(), [tensor for own in params for tensor in own.values()])

    found = gradients()
    with backbone._padded():
        expected = gradients()
    monkeypatch.setattr(token_loss, "CHUNK_ELEMENTS", 1 << 25)
    assert max(float(gradient.abs().max()) for gradient in found) > 1e-3
    for ours, theirs, whole in zip(found, expected, gradients(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(ours, whole, rtol=1e-6, atol=1e-9)


def test_a_second_derivative_needs_to_be_asked_for(folder):
    backbone = load_backbone(folder / "llama", "llama", kind="lora", head="language_model").double()
    tuning = read_tuning(folder / "llama", kind="lora", head="language_model")
    params = {
        name: torch.full(size, 0.1, dtype=torch.float64, requires_grad=True) for name, size in tuning.shapes.items()
    }
    batch = conversations().batch(range(4))
    tensors = list(params.values())
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        loss = tuning.loss_terms(backbone, [params], batch, twice=True).mean()
        first = torch.autograd.grad(loss, tensors, create_graph=True)
        assert all(gradient.any() for gradient in torch.autograd.grad(first[0].square().sum(), tensors))
        loss = tuning.loss_terms(backbone, [params], batch).mean()
        with pytest.raises(RuntimeError, match="once"):
            torch.autograd.grad(loss, tensors, create_graph=True)
        loss = tuning.loss_terms(backbone, [params], batch).mean()
        for ours, theirs in zip(torch.autograd.grad(loss, tensors), first, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-12)


def test_scores_of_tokens(folder, monkeypatch):
    monkeypatch.setattr(token_loss, "CHUNK_ELEMENTS", 5 * VOCABULARY)
    backbone = load_backbone(folder / "llama", "llama", head="language_model").double()
    batch = conversations().batch(range(4))
    losses, right = backbone.token_scores(batch)
    logits = load_plain(folder / "llama", "llama")(batch.input_ids, attention_mask=batch.attention_mask.long()).logits
    at, tokens = logits[batch.targets.texts, batch.targets.columns], batch.targets.tokens
    torch.testing.assert_close(losses, torch.nn.functional.cross_entropy(at, tokens, reduction="none"))
    assert torch.equal(right, at.argmax(1) == tokens)
