import json
import logging
from types import SimpleNamespace

import architectures
import pytest
import torch
from backbones import (
    DECODERS,
    ENCODERS,
    HIDDEN_SIZE,
    LONG_WORDS,
    NUM_LAYERS,
    NUM_TOKENS,
    VOCABULARY,
    WORDS,
    cached_logits,
    load_backbone,
    load_plain,
    make_batch,
    random_prompts,
    read_tuning,
    save_backbone,
    with_prompts,
)
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    AlbertModel,
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    BloomConfig,
    Data2VecTextForMaskedLM,
    DistilBertConfig,
    ElectraConfig,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaForCausalLM,
    ModernBertConfig,
    T5Config,
    XLMRobertaXLForMaskedLM,
    XmodForMaskedLM,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging as transformers_logging

from fedhpc.config.sections import ModelConfig
from fedhpc.data import recipe, tokenizer_files
from fedhpc.errors import ModelError
from fedhpc.model import pretrained
from fedhpc.model.last_layer import LastLayer
from fedhpc.model.pretrained import count_parameters, load_tokenizer, read_shape

FLAT_WORDS = [token for (token,) in WORDS]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("backbones")
    return {name: save_backbone(folder, name) for name in (*ENCODERS, *DECODERS, "opt")}


# References: transformers' own cache path for decoders, attention written out for encoders.


def encoder_logits(model, ids, mask, prompts, positions):
    """Logits [b, s, V] of a BERT or RoBERTa in matrix products, from its weights alone."""
    weights = dict(model.state_dict())
    prefix = model.base_model_prefix
    heads = model.config.num_attention_heads

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        spread = (centred.square().mean(-1, keepdim=True) + model.config.layer_norm_eps).sqrt()
        return centred / spread * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def gelu(x):
        return x * (1 + torch.erf(x / 2**0.5)) / 2

    def split_heads(x):  # [b, s, H] -> [b, heads, s, head_dim]
        return torch.stack(x.chunk(heads, dim=-1), dim=1)

    table = f"{prefix}.embeddings"
    x = weights[f"{table}.word_embeddings.weight"][ids] + weights[f"{table}.token_type_embeddings.weight"][0]
    x = norm(x + weights[f"{table}.position_embeddings.weight"][positions], f"{table}.LayerNorm")
    for layer in range(model.config.num_hidden_layers):
        name = f"{prefix}.encoder.layer.{layer}"
        query, key, value = (linear(x, f"{name}.attention.self.{part}") for part in ("query", "key", "value"))
        if prompts is not None:
            key, value = (
                torch.cat([prompt.expand(len(ids), -1, -1), part], dim=1)
                for prompt, part in zip(prompts[layer], (key, value), strict=True)
            )
        query, key, value = map(split_heads, (query, key, value))
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        visible = functional.pad(mask, (scores.shape[-1] - mask.shape[1], 0), value=True)[:, None, None]
        shares = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        mixed = torch.cat((shares @ value).unbind(1), dim=-1)
        x = norm(x + linear(mixed, f"{name}.attention.output.dense"), f"{name}.attention.output.LayerNorm")
        inner = gelu(linear(x, f"{name}.intermediate.dense"))
        x = norm(x + linear(inner, f"{name}.output.dense"), f"{name}.output.LayerNorm")
    dense, layer_norm, output = {
        "bert": ("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions.decoder"),
        "roberta": ("lm_head.dense", "lm_head.layer_norm", "lm_head.decoder"),
    }[prefix]
    return linear(norm(gelu(linear(x, dense)), layer_norm), output)


def positions_of(name, batch, first):
    """The positions that the sequence has behind `first` prompt positions."""
    steps = torch.arange(batch.input_ids.shape[1]).expand_as(batch.input_ids)
    if name != "roberta":
        return steps + first
    return torch.where(batch.attention_mask, steps + first + 2, 1)  # padding_idx 1; counted from padding_idx + 1


def reference_logits(name, model, batch, prompts, first):
    positions = positions_of(name, batch, first)
    if name in ENCODERS:
        return encoder_logits(model, batch.input_ids, batch.attention_mask, prompts, positions)
    # Behind the cache, transformers' own positions start after the prompts.
    own = None if first else positions
    return cached_logits(model, batch.input_ids, batch.attention_mask, prompts, own)


def at_slots(logits, batch):
    return logits[torch.arange(len(batch.slots)), batch.slots]


@pytest.mark.parametrize("first", [NUM_TOKENS, 0])
@pytest.mark.parametrize("lengths", [(9, 4, 7), (6, 6)], ids=["padded", "unpadded"])
@pytest.mark.parametrize("name", [*ENCODERS, *DECODERS])
def test_scores_and_gradients_with_prompts_equal_the_reference(folders, name, lengths, first):
    batch, plain = make_batch(name, lengths), load_plain(folders[name], name)
    prompts = random_prompts(plain.config, torch.float64)
    expected = at_slots(reference_logits(name, plain, batch, prompts, first), batch)[:, FLAT_WORDS]
    backbone, ours = load_backbone(folders[name], name), prompts.detach().float().requires_grad_()
    scores = backbone.word_scores(batch, with_prompts(ours, first))
    assert expected.std() > 0.3
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-5)

    (wanted,) = torch.autograd.grad(functional.cross_entropy(expected, batch.labels), prompts)
    (gradient,) = torch.autograd.grad(functional.cross_entropy(scores, batch.labels), ours)
    assert (wanted.flatten(2).norm(dim=2) > 1e-4).all()
    assert (gradient - wanted).norm() < 1e-4 * wanted.norm()


def test_a_text_that_holds_the_padding_token_is_read_as_by_the_plain_model(folders):
    """RoBERTa numbers positions past it."""
    backbone, plain = load_backbone(folders["roberta"], "roberta"), load_plain(folders["roberta"], "roberta")
    batch = make_batch("roberta", (9, 7))
    batch.input_ids[:, 2] = plain.config.pad_token_id
    with torch.no_grad():
        logits = plain(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        scores = backbone.word_scores(batch)
    torch.testing.assert_close(scores.double(), at_slots(logits, batch)[:, FLAT_WORDS], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "roberta", "gpt2", "llama-gqa"])
def test_prompts_and_positions_matter(folders, name):
    batch, backbone = make_batch(name), load_backbone(folders[name], name)
    prompts = random_prompts(backbone.base.config)
    with torch.no_grad():
        scores = [
            backbone.word_scores(batch, with_prompts(prompts, NUM_TOKENS)),
            backbone.word_scores(batch, with_prompts(prompts, 0)),
            backbone.word_scores(batch, with_prompts(prompts.flip(1), 0)),
            backbone.word_scores(batch),
        ]
    differences = [(a - b).abs().max() for i, a in enumerate(scores) for b in scores[:i]]
    assert min(differences) > 1e-2


@pytest.mark.parametrize("name", ["bert", "roberta", "gpt2", "llama-gqa", "qwen3"])
def test_only_the_class_words_columns_are_computed(folders, name):
    batch, backbone = make_batch(name), load_backbone(folders[name], name)
    computed = []
    for module in backbone.model.modules():
        module.register_forward_hook(lambda _module, _inputs, output: computed.append(output))
    with torch.no_grad():
        scores = backbone.word_scores(batch)
        plain = load_plain(folders[name], name)
        logits = plain(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    widths = [output.shape[-1] for output in computed if isinstance(output, torch.Tensor)]
    assert widths[-1] == len(WORDS)
    assert VOCABULARY not in widths
    torch.testing.assert_close(scores.double(), at_slots(logits, batch)[:, FLAT_WORDS], rtol=1e-5, atol=1e-5)
    head = backbone.model.get_output_embeddings()
    assert head.weight.shape == (len(WORDS), HIDDEN_SIZE)
    assert backbone.model.get_input_embeddings().weight.shape == (VOCABULARY, HIDDEN_SIZE)


@pytest.mark.parametrize("name", ["bert", "roberta", "gpt2", "llama-gqa"])
def test_vocabulary_loss_is_the_cross_entropy_over_all_words(folders, name):
    batch, plain = make_batch(name), load_plain(folders[name], name)
    prompts = random_prompts(plain.config, torch.float64)
    logits = at_slots(reference_logits(name, plain, batch, prompts, NUM_TOKENS), batch)
    words = torch.tensor(FLAT_WORDS)[batch.labels]
    expected = functional.cross_entropy(logits, words)
    backbone = load_backbone(folders[name], name, loss="vocabulary")
    scores = backbone.word_scores(batch, with_prompts(prompts.float(), NUM_TOKENS))
    torch.testing.assert_close(-scores.gather(1, batch.labels[:, None]).mean().double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa", "qwen3", "mistral"])
@pytest.mark.parametrize("first", [NUM_TOKENS, 0])
def test_words_of_several_tokens_score_as_in_passes_of_their_own(folders, name, first):
    batch, plain = make_batch(name), load_plain(folders[name], name)
    prompts = random_prompts(plain.config, torch.float64)
    expected = torch.empty(len(batch.labels), len(LONG_WORDS), dtype=torch.float64)
    for row, slot in enumerate(batch.slots.tolist()):
        for column, word in enumerate(LONG_WORDS):
            ids = torch.cat([batch.input_ids[row, : slot + 1], torch.tensor(word)])[None]
            positions = torch.arange(first, first + ids.shape[1])[None]
            logits = cached_logits(plain, ids, torch.ones_like(ids), prompts, positions)
            log_probabilities = logits[0, slot:-1].log_softmax(-1)
            expected[row, column] = log_probabilities.gather(1, torch.tensor(word)[:, None]).mean()
    backbone, ours = load_backbone(folders[name], name, words=LONG_WORDS), prompts.detach().float().requires_grad_()
    scores = backbone.word_scores(batch, with_prompts(ours, first))
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-5)
    (wanted,) = torch.autograd.grad(functional.cross_entropy(expected, batch.labels), prompts)
    (gradient,) = torch.autograd.grad(functional.cross_entropy(scores, batch.labels), ours)
    assert (gradient - wanted).norm() < 1e-4 * wanted.norm()


@pytest.mark.parametrize("name", [*ENCODERS, *DECODERS])
def test_without_prompts_transformers_computes_the_same_bits(folders, name, monkeypatch):
    batch = make_batch(name)
    model = AutoModel.from_pretrained(folders[name], attn_implementation="sdpa").eval()
    inputs = [{"input_ids": batch.input_ids, "attention_mask": mask} for mask in (batch.attention_mask, None)]
    with torch.no_grad():
        wrapped = [model(**values).last_hidden_state for values in inputs]
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", sdpa_attention_forward)
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
        own = [model(**values).last_hidden_state for values in inputs]
    assert all(torch.equal(a, b) for a, b in zip(wrapped, own, strict=True))


def loss_and_gradient(backbone, batch, prompts, *, training=True, dropout=True):
    backbone.training_mode(training, dropout=dropout)
    leaf = prompts.detach().clone().requires_grad_()
    loss = functional.cross_entropy(backbone.word_scores(batch, with_prompts(leaf, NUM_TOKENS)), batch.labels)
    loss.backward()
    return loss.detach(), leaf.grad


def count_attention(backbone):
    """A list that grows with every forward pass through an attention module."""
    calls = []
    for module in backbone.base.modules():
        if hasattr(module, "layer_idx") and any(module.children()):
            module.register_forward_hook(lambda module, _inputs, _output: calls.append(module.layer_idx))
    return calls


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama-gqa", "opt"])  # OPT's layers have dropout of their own
def test_gradient_checkpointing_recomputes_and_changes_nothing(folders, name):
    batch = make_batch(name)
    plain = load_backbone(folders[name], name)
    prompts = random_prompts(plain.base.config)
    calls = count_attention(plain)
    loss, gradient = loss_and_gradient(plain, batch, prompts)
    assert calls == list(range(NUM_LAYERS))

    saving = load_backbone(folders[name], name, gradient_checkpointing=True)
    calls = count_attention(saving)
    assert calls == []
    again = loss_and_gradient(saving, batch, prompts)
    assert sorted(calls) == sorted([*range(NUM_LAYERS)] * 2)
    assert torch.equal(again[0], loss)
    assert torch.equal(again[1], gradient)
    calls.clear()
    assert torch.equal(loss_and_gradient(saving, batch, prompts, dropout=False)[1], gradient)
    assert sorted(calls) == sorted([*range(NUM_LAYERS)] * 2)
    calls.clear()
    assert torch.equal(loss_and_gradient(saving, batch, prompts, training=False)[1], gradient)
    assert calls == list(range(NUM_LAYERS))

    dropping = load_backbone(folders[name], name, gradient_checkpointing=True, backbone_dropout=True)
    calls = count_attention(dropping)
    assert torch.equal(loss_and_gradient(dropping, batch, prompts, dropout=False)[1], gradient)
    assert sorted(calls) == sorted([*range(NUM_LAYERS)] * 2)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_backbone_dropout_acts_in_training_alone(folders, name):
    batch = make_batch(name)
    still, dropping = (load_backbone(folders[name], name, backbone_dropout=on) for on in (False, True))
    prompts = random_prompts(still.base.config)
    assert torch.equal(loss_and_gradient(still, batch, prompts)[1], loss_and_gradient(still, batch, prompts)[1])
    evaluated = loss_and_gradient(dropping, batch, prompts, training=False)[1]
    assert torch.equal(evaluated, loss_and_gradient(still, batch, prompts)[1])
    assert torch.equal(evaluated, loss_and_gradient(dropping, batch, prompts, dropout=False)[1])
    assert not torch.allclose(loss_and_gradient(dropping, batch, prompts)[1], evaluated, rtol=0.01)


@pytest.mark.parametrize("name", ["roberta", "llama-gqa"])
def test_bfloat16_backbone_trains_float32_prompts(folders, name):
    batch = make_batch(name)
    exact, half = load_backbone(folders[name], name), load_backbone(folders[name], name, dtype="bfloat16")
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.bfloat16}
    prompts = random_prompts(exact.base.config, std=0.3)
    loss, gradient = loss_and_gradient(exact, batch, prompts)
    half_loss, half_gradient = loss_and_gradient(half, batch, prompts)
    assert (half_loss.dtype, half_gradient.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(half_loss, loss, rtol=0.1, atol=0.1)
    assert functional.cosine_similarity(half_gradient.flatten(), gradient.flatten(), dim=0) > 0.9


def test_a_small_loss_has_a_gradient_in_float16_too(folders):
    """As late in training, where most of a batch is right."""
    batch = make_batch("roberta")
    exact, half = (load_backbone(folders["roberta"], "roberta", dtype=dtype) for dtype in ("float32", "float16"))
    prompts = random_prompts(exact.base.config, std=0.3)

    def gradient(backbone):
        leaf = prompts.clone().requires_grad_()
        scores = backbone.word_scores(batch, with_prompts(leaf, NUM_TOKENS))
        return backbone.gradients(1e-6 * functional.cross_entropy(scores, batch.labels), [leaf])[0]

    assert functional.cosine_similarity(gradient(half).flatten(), gradient(exact).flatten(), dim=0) > 0.99


def test_backbone_is_frozen(folders):
    backbone = load_backbone(folders["bert"], "bert", backbone_dropout=True, gradient_checkpointing=True)
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


@pytest.mark.parametrize("name", ["roberta", "llama-gqa"])
def test_layer_outputs_are_the_hidden_states_without_prompts(folders, name):
    batch, plain = make_batch(name), load_plain(folders[name], name, torch.float32)
    backbone = load_backbone(folders[name], name)
    outputs = backbone.layer_outputs(batch)
    states = plain(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True
    ).hidden_states[1:]
    assert len(outputs) == NUM_LAYERS
    for output, state in zip(outputs[:-1], states[:-1], strict=True):  # the last state comes after a final norm
        torch.testing.assert_close(output, state, rtol=1e-4, atol=1e-4)
    assert len(backbone.layer_outputs(batch)) == NUM_LAYERS


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_linear_head_needs_no_language_model_head(folders, name, tmp_path):
    AutoModel.from_pretrained(folders[name]).save_pretrained(tmp_path)
    batch, backbone = make_batch(name), load_backbone(tmp_path, name, head="linear")
    prompts = random_prompts(backbone.base.config)
    pooled = backbone.pooled(batch, with_prompts(prompts, NUM_TOKENS))
    assert pooled.shape == (3, HIDDEN_SIZE)
    (gradient,) = torch.autograd.grad(pooled.square().sum(), prompts)
    assert gradient.flatten(1).any(1).all()


def test_shape_and_parameters_come_from_the_configuration_alone(folders):
    shapes = {name: read_shape(str(folder)) for name, folder in folders.items()}
    assert {name: (shape.num_layers, shape.num_heads, shape.key_width) for name, shape in shapes.items()} == {
        **dict.fromkeys(shapes, (NUM_LAYERS, 4, 16)),
        **dict.fromkeys(("bert", "roberta", "gpt2", "llama", "opt"), (NUM_LAYERS, 4, 32)),
        "qwen3": (NUM_LAYERS, 4, 32),
    }
    assert shapes["bert"].max_positions == 64
    assert shapes["roberta"].max_positions == 62
    model = AutoModel.from_pretrained(folders["gpt2"])
    assert count_parameters(str(folders["gpt2"])) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", ["roberta", "gpt2", "llama-gqa"])
def test_the_last_position_is_usable(folders, name):
    shape = read_shape(str(folders[name]))
    backbone = load_backbone(folders[name], name)
    batch = make_batch(name, (shape.max_positions - NUM_TOKENS, 4))
    prompts = random_prompts(backbone.base.config)
    assert backbone.word_scores(batch, with_prompts(prompts, NUM_TOKENS)).isfinite().all()


# Errors


def test_missing_folder_says_what_was_looked_for(tmp_path):
    gone = tmp_path / "gone"
    for load in (read_shape, load_tokenizer, lambda name: load_backbone(name, "bert")):
        with pytest.raises(
            ModelError, match=rf"model\.name: {gone} cannot be loaded \(no folder {gone}; otherwise .*hub"
        ):
            load(str(gone))


def test_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"cannot be loaded \(the folder exists; "):
        read_shape(str(tmp_path))


@pytest.mark.parametrize("left", [0, 7, 100, -100])
def test_truncated_weights_are_refused(tmp_path, left):
    path = save_backbone(tmp_path, "gpt2")
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(ModelError, match=r"gpt2 cannot be loaded .*/gpt2/model\.safetensors .*is cut short"):
        load_backbone(path, "gpt2")


def test_checkpoint_without_language_model_head_is_refused(folders, tmp_path):
    BertModel.from_pretrained(folders["bert"]).save_pretrained(tmp_path)
    with pytest.raises(
        ModelError,
        match=r"lacks weights for cls\..*no language-model head: .* --head linear and set tuning\.head: linear",
    ):
        load_backbone(tmp_path, "bert")


@pytest.mark.parametrize("head", ["verbalizer", "linear"])
def test_missing_weights_are_refused(tmp_path, head):
    path = save_backbone(tmp_path, "llama")
    weights = load_file(path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks weights for [a-z.]*layers\.1\.mlp\.up_proj\.weight$"):
        load_backbone(path, "llama", head=head)


def test_weights_beyond_the_configuration_are_refused(tmp_path):
    path = save_backbone(tmp_path, "llama")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    with pytest.raises(ModelError, match=r"weights beyond the 1 layers of its configuration: model\.layers\.1"):
        load_backbone(path, "llama")


def test_weights_of_another_shape_are_refused(tmp_path):
    path = save_backbone(tmp_path, "llama")
    weights = load_file(path / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(HIDDEN_SIZE + 1)
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="llama cannot be loaded"):
        load_backbone(path, "llama")


def save_falcon(folder):
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    FalconForCausalLM(FalconConfig(**sizes)).save_pretrained(folder)
    return folder


def test_architectures_that_take_no_prompts_are_refused(tmp_path):
    falcon = load_backbone(save_falcon(tmp_path / "falcon"), "gpt2")
    with pytest.raises(
        ModelError, match=r"tuning.kind: prompt: model.name: .*falcon takes no notice of it; choose another tuning.kind"
    ):
        read_tuning(tmp_path / "falcon").check_on(falcon)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    AlbertModel(AlbertConfig(**sizes, embedding_size=16, intermediate_size=48)).save_pretrained(tmp_path / "albert")
    albert = load_backbone(tmp_path / "albert", "bert", head="linear")
    with pytest.raises(
        ModelError,
        match=r"albert does not take it: its attention modules do not .* choose another tuning.kind",
    ):
        read_tuning(tmp_path / "albert", head="linear").check_on(albert)
    AlbertForMaskedLM(AlbertConfig(**sizes, embedding_size=16, intermediate_size=48)).save_pretrained(
        tmp_path / "words"
    )
    with pytest.raises(ModelError, match="words does not take it: its attention modules"):
        read_tuning(tmp_path / "words").check_on(load_backbone(tmp_path / "words", "bert"))
    with pytest.raises(
        ModelError,
        match=r"albert model has no layers that can be told apart; choose a tuning.kind that changes neither",
    ):
        read_tuning(tmp_path / "words", kind="lora")


def test_gradient_checkpointing_that_a_model_does_not_have_is_refused(tmp_path):
    architectures.save_architecture(tmp_path, "albert", VOCABULARY)
    load_backbone(tmp_path, "bert", kind="prompt_tuning")
    with pytest.raises(ModelError, match=r"model\.gradient_checkpointing: .* a albert model has none: "):
        load_backbone(tmp_path, "bert", kind="prompt_tuning", gradient_checkpointing=True)


@pytest.mark.parametrize("kind", ["lora", "adapter", "full"])
def test_architectures_that_take_no_prompts_can_be_tuned_otherwise(tmp_path, kind):
    falcon = load_backbone(save_falcon(tmp_path), "gpt2", kind=kind)
    read_tuning(tmp_path, kind=kind).check_on(falcon)


def test_answers_that_see_each_other_are_refused(tmp_path):
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "pad_token_id": 1}
    heads = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    kinds = {"layer_types": ["conv", "full_attention", "conv"], "conv_L_cache": 3, "block_auto_adjust_ff_dim": False}
    config = Lfm2Config(**sizes, **heads, **kinds, initializer_range=0.3)
    Lfm2ForCausalLM(config).save_pretrained(tmp_path)
    load_backbone(tmp_path, "llama", kind="prompt_tuning")
    with pytest.raises(ModelError, match="a lfm2 model does not only look where the attention mask says"):
        load_backbone(tmp_path, "llama", kind="prompt_tuning", words=LONG_WORDS)


def test_layers_that_ignore_prompts_are_named(folders, monkeypatch):
    attend = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def deaf_in_layer_1(module, *args, prompts=None, **kwargs):
        return attend(module, *args, prompts=None if module.layer_idx == 1 else prompts, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", deaf_in_layer_1)
    with pytest.raises(ModelError, match=r"llama takes no notice of prompts in layers \[1\]"):
        read_tuning(folders["llama"]).check_on(load_backbone(folders["llama"], "llama"))


@pytest.mark.parametrize("cap", [3.0, 30.0, 100.0])
def test_a_soft_cap_counts_however_far_the_logits_are_from_it(tmp_path, cap):
    """Where it changes them by half, and where by less than a probe of the model would tell."""
    path = architectures.save_architecture(tmp_path, "gemma3", VOCABULARY, final_logit_softcapping=cap)
    batch, plain = make_batch("llama"), AutoModelForCausalLM.from_pretrained(path).eval()
    with torch.no_grad():
        logits = plain(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        scores = load_backbone(path, "llama").word_scores(batch)
    torch.testing.assert_close(scores, at_slots(logits, batch)[:, FLAT_WORDS], rtol=1e-5, atol=1e-5)
    plain.config.final_logit_softcapping = None
    with torch.no_grad():
        uncapped = at_slots(plain(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits, batch)
    assert (uncapped[:, FLAT_WORDS] - scores).abs().max() > 5e-4


def test_logits_that_cannot_be_computed_from_hidden_states_are_refused(tmp_path, monkeypatch):
    forward = LlamaForCausalLM.forward

    def with_something_more(model, input_ids=None, **kwargs):
        output = forward(model, input_ids, **kwargs)
        output.logits = output.logits + (0 if input_ids is None else 1e-3)
        return output

    path = save_backbone(tmp_path, "llama")
    load_backbone(path, "llama")
    monkeypatch.setattr(LlamaForCausalLM, "forward", with_something_more)
    with pytest.raises(ModelError, match=r"a llama model has logits that fedhpc does not know .* --head linear"):
        load_backbone(path, "llama")
    load_backbone(path, "llama", head="linear")


def test_a_last_layer_at_the_slots_alone_that_is_almost_the_same_is_not_used(tmp_path, monkeypatch):
    path, forward = save_backbone(tmp_path, "llama"), LastLayer._at_slots

    def almost(layer, hidden, *args, slots=None, **kwargs):
        return forward(layer, hidden, *args, slots=slots, **kwargs) + (0 if slots is None else 1e-3)

    assert load_backbone(path, "llama")._last_layer is not None
    monkeypatch.setattr(LastLayer, "_at_slots", almost)
    assert load_backbone(path, "llama")._last_layer is None


@pytest.mark.parametrize("head", ["verbalizer", "linear"])
def test_architectures_that_number_positions_otherwise_are_refused(tmp_path, monkeypatch, head):
    folder = save_backbone(tmp_path, "roberta")
    load_backbone(folder, "roberta", head=head)
    monkeypatch.setattr("fedhpc.model.forward.POSITIONS_COUNT_TOKENS", ())
    with pytest.raises(ModelError, match="a roberta model numbers its positions as fedhpc does not know"):
        load_backbone(folder, "roberta", head=head)


@pytest.mark.parametrize("model_class", [XLMRobertaXLForMaskedLM, Data2VecTextForMaskedLM, XmodForMaskedLM])
def test_all_relatives_of_roberta_count_positions_as_it_does(tmp_path, model_class):
    common = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = model_class.config_class(vocab_size=VOCABULARY, pad_token_id=1, initializer_range=0.2, **common)
    if hasattr(config, "default_language"):
        config.default_language = config.languages[0]
    model_class(config).save_pretrained(tmp_path)
    load_backbone(tmp_path, "roberta")


@pytest.mark.parametrize(
    ("config_class", "architecture", "has_head"),
    [
        (ElectraConfig, "ElectraForPreTraining", False),
        (ElectraConfig, "ElectraForMaskedLM", True),
        (BertConfig, "BertForPreTraining", True),
        (DistilBertConfig, "DistilBertModel", False),
        (ModernBertConfig, "ModernBertForMaskedLM", True),
    ],
)
def test_prepare_tells_models_that_predict_words_from_others(config_class, architecture, has_head):
    config = config_class(architectures=[architecture])
    assert recipe.model_kind(config) == ("encoder", has_head)


def test_encoder_decoders_are_refused(tmp_path):
    T5Config(d_model=32, num_layers=2, num_heads=4).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="a t5 model, an encoder-decoder; only encoders and decoders can be tuned"):
        read_shape(str(tmp_path))


def kernels(**supported):
    return type("ToyForCausalLM", (), {"_supports_sdpa": False, "_supports_flash_attn": False, **supported})


@pytest.mark.parametrize(
    ("attention", "model_type", "message"),
    [
        ("sdpa", kernels(), r"toy: transformers has no sdpa attention for a bloom model; choose another model$"),
        (
            "sdpa",
            kernels(_supports_flash_attn=True),
            r"use model\.attention: flash_attention_2, which needs its own package and a GPU$",
        ),
        ("flash_attention_2", kernels(_supports_sdpa=True), "no flash_attention_2 .* use model.attention: sdpa"),
        (
            "flash_attention_3",
            kernels(_supports_sdpa=True, _supports_flash_attn=True),
            r"model.attention: flash_attention_3 needs its own package and a GPU that it runs on; use .*: sdpa",
        ),
    ],
    ids=["none", "another", "sdpa alone", "not installed"],
)
def test_refusals_of_attention_kernels_advise_what_there_is(attention, model_type, message):
    loader, config = (
        SimpleNamespace(_model_mapping={BloomConfig: model_type}),
        ModelConfig(name="toy", attention=attention),
    )
    with pytest.raises(ModelError, match=message):
        pretrained._check_kernel(config, BloomConfig(), loader)


def test_a_model_without_sdpa_attention_is_refused_before_it_is_loaded(tmp_path):
    Gemma2Config(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2).save_pretrained(tmp_path)  # no weights
    with pytest.raises(
        ModelError, match=r"no sdpa attention for a gemma2 model; use model\.attention: flash_attention_2"
    ):
        load_backbone(tmp_path, "llama")


@pytest.mark.parametrize(
    ("content", "installed", "advice"),
    [
        (b"\n\016\n\005<unk>\025\0\0\0\0\030\002", (), True),
        (b"\n\016\n\005<unk>\025\0\0\0\0\030\002", ("sentencepiece",), True),
        (b"\n\016\n\005<unk>\025\0\0\0\0\030\002", ("sentencepiece", "google.protobuf"), False),
        (b"IQ== 0\n", (), False),  # tiktoken's, of the same name
    ],
    ids=["neither", "one of two", "both", "tiktoken"],
)
def test_a_sentencepiece_file_alone_names_the_extra_that_converts_it(tmp_path, monkeypatch, content, installed, advice):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "tokenizer.model").write_bytes(content)
    monkeypatch.setattr(tokenizer_files, "_is_installed", lambda package: package in installed)
    assert ("pip install sentencepiece protobuf" in pretrained.tokenizer_advice(str(tmp_path))) == advice
    if not installed and advice:
        with pytest.raises(ModelError, match=r"cannot be loaded .*pip install sentencepiece protobuf$"):
            load_tokenizer(str(tmp_path))


def test_spreading_over_gpus_without_accelerate_names_the_extra(folders, monkeypatch):
    monkeypatch.setattr(pretrained, "find_spec", lambda _name: None)
    with pytest.raises(ModelError, match=r"pip install accelerate"):
        load_backbone(folders["gpt2"], "gpt2", device_map="auto")


def test_spread_backbone_gives_the_same_scores(folders):
    accelerate = pytest.importorskip("accelerate")
    for name in ("bert", "gpt2", "llama-gqa"):
        batch, single = make_batch(name), load_backbone(folders[name], name)
        spread = load_backbone(folders[name], name, device_map="auto")
        accelerate.dispatch_model(spread.model, {"": "cpu"}, force_hooks=True)
        prompts = random_prompts(single.base.config)
        expected, scores = (backbone.word_scores(batch, with_prompts(prompts)) for backbone in (single, spread))
        assert torch.equal(scores, expected)


def test_loading_prints_nothing_and_leaves_logging_as_it_was(folders, capfd):
    said = []
    handler = logging.Handler()
    handler.emit = said.append
    transformers_logging.add_handler(handler)
    transformers_logging.set_verbosity_info()
    transformers_logging.enable_progress_bar()
    try:
        load_backbone(folders["bert"], "bert", head="linear")  # with weights that it has no use for
        assert transformers_logging.get_verbosity() == transformers_logging.INFO
        assert transformers_logging.is_progress_bar_enabled()
    finally:
        transformers_logging.set_verbosity_warning()
        transformers_logging.remove_handler(handler)
    assert said == []
    assert capfd.readouterr() == ("", "")
