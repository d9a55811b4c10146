"""Every kind of tuning computes what its paper says, on encoders and decoders: against PEFT, or against plain
transformers models with the same numbers in them."""

import copy
import os

import numpy as np
import pytest
import torch
from backbones import (
    ENCODERS,
    HIDDEN_SIZE,
    NUM_LAYERS,
    NUM_TOKENS,
    VOCABULARY,
    WORDS,
    load_backbone,
    load_plain,
    make_batch,
    read_tuning,
    save_backbone,
)
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from fedhpc.errors import ConfigError, ModelError
from fedhpc.registry import TUNINGS

NAMES = ("bert", "roberta", "gpt2", "llama-gqa")
NUM_SOURCES = 2


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tunings")
    for number in range(NUM_SOURCES):
        (folder / f"source{number}").mkdir()
        prompt = torch.randn(NUM_TOKENS, HIDDEN_SIZE, generator=torch.Generator().manual_seed(number))
        save_file({"prompt_embeddings": prompt}, folder / f"source{number}" / "adapter_model.safetensors")
    for name in (*NAMES, "opt"):
        save_backbone(folder, name)
    return folder


def tuned(world, name, kind, **more):
    """A backbone, a tuning and float64 parameters for it, large enough to matter."""
    if kind == "attempt":
        more["sources"] = [str(world / f"source{number}") for number in range(NUM_SOURCES)]
    tuning = read_tuning(world / name, kind=kind, bottleneck=5, rank=3, alpha=4.0, **more)
    backbone = load_backbone(world / name, name, head=more.get("head", "verbalizer")).double()
    rng = torch.Generator().manual_seed(5)
    shapes = {**tuning.per_layer, **tuning.shared}
    params = {key: 0.3 * torch.randn(size, generator=rng, dtype=torch.float64) for key, size in shapes.items()}
    return backbone, tuning, {key: tensor.requires_grad_() for key, tensor in params.items()}


def assert_same(scores, expected):
    # LLaMA's norms and rotations compute in float32 in a float64 model too.
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)


def at_slots(logits, batch):
    """Logits of the class words at the answer slots [b, C]."""
    return logits[torch.arange(len(batch.slots)), batch.slots][:, [ids[0] for ids in WORDS]]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", TUNINGS)
def test_every_parameter_of_every_layer_matters(world, name, kind):
    if kind == "bitfit" and name.startswith("llama"):
        with pytest.raises(ModelError, match="has no biases"):
            tuned(world, name, kind)
        return
    for head in ("verbalizer", "linear"):
        backbone, tuning, _ = tuned(world, name, kind, head=head)
        tuning.check_on(backbone.float())


@pytest.mark.parametrize("kind", ["lora", "adapter"])
def test_layers_that_take_no_notice_are_named(world, kind):
    backbone, tuning, _ = tuned(world, "bert", kind)
    backbone.float()._layers[1].forward = lambda hidden, *_, **__: hidden
    with pytest.raises(ModelError, match=rf"tuning.kind: {kind}: .* takes no notice of .* in layers \[1\]"):
        tuning.check_on(backbone)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["bitfit", "full"])
def test_a_key_bias_that_does_nothing_in_16_bits_is_no_reason_to_refuse_a_model(world, kind, dtype):
    read_tuning(world / "roberta", kind=kind).check_on(load_backbone(world / "roberta", "roberta", dtype=dtype))


@pytest.mark.parametrize("name", [*NAMES, "opt"])  # OPT has examples and positions in one axis for a while
@pytest.mark.parametrize("kind", [kind for kind in TUNINGS if TUNINGS[kind].packable])
def test_devices_side_by_side_score_as_one_by_one(world, name, kind):
    backbone, tuning, first = tuned(world, name, kind)
    second = {key: tensor.flip(0) for key, tensor in first.items()}
    whole = make_batch(name, (9, 4, 7, 9, 5))
    together = tuning.forward(backbone, [first, second], pick(whole, slice(None), (2, 3)))
    assert_same(together[:2], tuning.forward(backbone, [first], pick(whole, slice(0, 2), (2,))))
    assert_same(together[2:], tuning.forward(backbone, [second], pick(whole, slice(2, 5), (3,))))


def pick(batch, rows, sizes):
    tensors = {key: getattr(batch, key)[rows] for key in ("input_ids", "attention_mask", "slots", "labels", "lengths")}
    return type(batch)(**tensors, sizes=sizes)


PATTERNS = {
    "bert": (["attention.self.key", "*output.dense"], ["attention.self.key", "attention.output.dense", "output.dense"]),
    "gpt2": (["*.c_proj"], ["attn.c_proj", "mlp.c_proj"]),
    "llama-gqa": (["mlp.up_proj", "self_attn.[ko]_proj"], ["self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj"]),
}
"""Of `tuning.targets`, and what they match."""


@pytest.mark.parametrize("name", PATTERNS)
def test_patterns_say_which_modules_lora_changes(world, name):
    patterns, modules = PATTERNS[name]
    assert read_tuning(world / name, kind="lora", targets=patterns).modules == tuple(modules)


def test_a_pattern_that_matches_nothing_is_named_with_what_there_is(world):
    there = "its layers have self_attn.q_proj, .*, mlp.down_proj; did you mean self_attn.q_proj?"
    with pytest.raises(ModelError, match=f"tuning.targets: q_prj matches no linear module of model.name: .*; {there}"):
        read_tuning(world / "llama-gqa", kind="lora", targets=["*.v_proj", "q_prj"])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", [{}, {"targets": "all-linear", "dropout": 0.3}, {"rslora": True}], ids=str)
def test_lora_is_pefts(world, name, options):
    backbone, tuning, params = tuned(world, name, "lora", **options)
    targets = [f"{layer}.{module}" for layer in range(NUM_LAYERS) for module in tuning.modules]
    plain = load_plain(world / name, name)
    rslora = options.get("rslora", False)
    model = get_peft_model(plain, LoraConfig(r=3, lora_alpha=4, target_modules=targets, use_rslora=rslora))
    state = model.state_dict()
    for key, tensor in params.items():
        part, _, module = key.partition(".")
        for layer in range(NUM_LAYERS):
            theirs = next(k for k in state if f".{layer}.{module}.{part}." in k)
            state[theirs].copy_(tensor[layer])
    batch = make_batch(name)
    theirs = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    assert_same(tuning.forward(backbone, [params], batch), at_slots(theirs, batch))


def test_lora_drops_what_enters_each_module_by_the_devices_seed(world):
    """Layers, modules and devices have the same A and B, and the same input: only dropout can differ."""
    _, tuning, params = tuned(world, "llama-gqa", "lora", targets="all-linear", dropout=0.5)
    backbone, batch = load_backbone(world / "llama-gqa", "llama-gqa"), make_batch("llama-gqa")
    same = {
        key: params[key.replace("o_proj", "q_proj")][:1].expand_as(tensor).float() for key, tensor in params.items()
    }
    rows, modules = torch.ones(6, HIDDEN_SIZE), ("self_attn.q_proj", "self_attn.o_proj")

    def changes(seeds):
        edits = tuning.overlay(backbone, [same, same], batch, seeds).edits
        return torch.cat(
            [edits[m](layer, rows, torch.zeros(6, HIDDEN_SIZE), [3, 3]) for m in modules for layer in (0, 1)]
        )

    assert len(changes([3, 4]).unique(dim=0)) == 24
    assert torch.equal(changes([3, 4]), changes([3, 4]))
    assert len(changes(None).unique(dim=0)) == 1
    assert (changes([3, 4])[:3] == changes([3, 5])[:3]).all()
    many = torch.stack([changes([seed, seed]) for seed in range(60)])
    torch.testing.assert_close(many.mean((0, 1)), changes(None)[0], rtol=0, atol=0.1)


@pytest.mark.parametrize("name", NAMES)
def test_prompt_tuning_is_pefts(world, name):
    backbone, tuning, params = tuned(world, name, "prompt_tuning")
    task_type = "FEATURE_EXTRACTION" if name in ENCODERS else "CAUSAL_LM"
    config = PromptTuningConfig(task_type=task_type, num_virtual_tokens=NUM_TOKENS, token_dim=HIDDEN_SIZE)
    model = get_peft_model(load_plain(world / name, name), config)
    model.prompt_encoder["default"].embedding.weight.data = params["tokens"].detach()
    batch = make_batch(name)
    theirs = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, NUM_TOKENS:]
    assert_same(tuning.forward(backbone, [params], batch), at_slots(theirs, batch))


@pytest.mark.parametrize(
    ("name", "kind"), [(n, k) for n in NAMES for k in ("bitfit", "full") if (n, k) != ("llama-gqa", "bitfit")]
)
def test_changed_weights_are_those_of_a_model_that_has_them(world, name, kind):
    backbone, tuning, params = tuned(world, name, kind)
    plain, batch = load_plain(world / name, name), make_batch(name)
    base = dict(plain.base_model.named_parameters())
    head = next(module for key, module in plain.named_children() if key != plain.base_model_prefix)
    head = copy.deepcopy(head)  # it may share the embeddings, which change
    with torch.no_grad():
        for key, change in params.items():
            where, _, path = key.partition(".")
            if where == "model":
                base[path] += change
            else:
                for layer, prefix in enumerate(tuning.prefixes):
                    base[f"{prefix}.{path}"][...] += change[layer]
    assert kind == "full" or all(key.endswith("bias") for key in params)
    left = {path for path in base if "pooler" not in path} - {
        path for key in params for path in paths(key, tuning.prefixes)
    }
    assert not left if kind == "full" else not [path for path in left if path.endswith("bias")]
    hidden = plain.base_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
    assert_same(tuning.forward(backbone, [params], batch), at_slots(head(hidden), batch))


def paths(key, prefixes):
    where, _, path = key.partition(".")
    return [path] if where == "model" else [f"{prefix}.{path}" for prefix in prefixes]


class WithAdapter(nn.Module):
    """Houlsby et al., figure 2: h + W_up gelu(W_down h)."""

    def __init__(self, module, down, down_bias, up, up_bias):
        super().__init__()
        self.module, self.numbers = module, (down, down_bias, up, up_bias)

    def forward(self, x):
        h = self.module(x)
        down, down_bias, up, up_bias = self.numbers
        return h + (functional.gelu(h @ down.T + down_bias) @ up.T + up_bias)


@pytest.mark.parametrize("name", NAMES)
def test_adapters_are_modules_behind_both_blocks(world, name):
    backbone, tuning, params = tuned(world, name, "adapter")
    plain, batch = load_plain(world / name, name), make_batch(name)
    layers = next(module for module in plain.modules() if isinstance(module, nn.ModuleList))
    for module in tuning.modules:
        for index, layer in enumerate(layers):
            keys = (f"down.{module}", f"down.{module}.bias", f"up.{module}", f"up.{module}.bias")
            wrapped = WithAdapter(layer.get_submodule(module), *(params[key][index] for key in keys))
            layer.set_submodule(module, wrapped)
    theirs = plain(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    assert_same(tuning.forward(backbone, [params], batch), at_slots(theirs, batch))


def generated(params, h):
    """W_2 tanh(W_1 h + b_1) + b_2, as T tokens of width H."""
    inner = torch.tanh(h @ params["generator.down"].T + params["generator.down.bias"])
    return (inner @ params["generator.up"].T + params["generator.up.bias"]).view(len(h), NUM_TOKENS, HIDDEN_SIZE)


def mean_of_text(hidden, mask):
    return torch.stack([row[keep].mean(0) for row, keep in zip(hidden, mask.bool(), strict=True)])


def logits_with_tokens(plain, tokens, batch):
    """Of a plain model whose inputs begin with soft tokens."""
    words = plain.get_input_embeddings()(batch.input_ids)
    mask = functional.pad(batch.attention_mask.long(), (NUM_TOKENS, 0), value=1)
    return plain(inputs_embeds=torch.cat([tokens, words], dim=1), attention_mask=mask).logits[:, NUM_TOKENS:]


@pytest.mark.parametrize("name", NAMES)
def test_instance_prompts_come_from_the_frozen_backbones_view_of_the_text(world, name):
    backbone, tuning, params = tuned(world, name, "instance_prompt")
    plain, batch = load_plain(world / name, name), make_batch(name)
    with torch.no_grad():
        hidden = plain.base_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
    tokens = generated(params, mean_of_text(hidden, batch.attention_mask))
    expected = at_slots(logits_with_tokens(plain, tokens, batch), batch)
    assert_same(tuning.forward(backbone, [params], batch), expected)


@pytest.mark.parametrize("name", NAMES)
def test_attempt_mixes_source_prompts_by_attention(world, name):
    backbone, tuning, params = tuned(world, name, "attempt")
    plain, batch = load_plain(world / name, name), make_batch(name)
    words = plain.get_input_embeddings()(batch.input_ids)
    text = torch.stack([row[keep].amax(0) for row, keep in zip(words, batch.attention_mask.bool(), strict=True)])
    prompts = [*tuning.sources.double(), params["tokens"]]
    inner = functional.silu(text @ params["attention.down"].T) @ params["attention.up"].T
    normal = (inner - inner.mean(1, keepdim=True)) / (inner.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    logits = torch.stack([normal @ prompt.amax(0) for prompt in prompts], dim=1) / (HIDDEN_SIZE * np.e)
    weights = logits.exp() / logits.exp().sum(1, keepdim=True)
    tokens = params["tokens"] + sum(w[:, None, None] * p for w, p in zip(weights.T, prompts, strict=True))
    expected = at_slots(logits_with_tokens(plain, tokens, batch), batch)
    assert_same(tuning.forward(backbone, [params], batch), expected)


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize("name", ["bert", "llama-gqa"])
def test_late_prompts_enter_in_the_middle(world, name, layer):
    """A model of the lower layers reads the text, one of the upper layers the tokens and what became of the text."""
    backbone, tuning, params = tuned(world, name, "late_prompt", layer=layer)
    batch = make_batch(name)
    positions = torch.arange(NUM_TOKENS, NUM_TOKENS + batch.input_ids.shape[1])[None]
    lower, upper = load_plain(world / name, name), load_plain(world / name, name)
    cut(lower.base_model, slice(0, layer), first=True)
    cut(upper.base_model, slice(layer, None), first=False)
    hidden = lower.base_model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=positions, use_cache=False
    ).last_hidden_state
    tokens = generated(params, mean_of_text(hidden, batch.attention_mask))
    mask = functional.pad(batch.attention_mask.long(), (NUM_TOKENS, 0), value=1)
    states = torch.cat([tokens, hidden], dim=1)
    logits = upper(inputs_embeds=states, attention_mask=mask, use_cache=False).logits[:, NUM_TOKENS:]
    assert_same(tuning.forward(backbone, [params], batch), at_slots(logits, batch))


def cut(base, layers, *, first):
    """Leave some of a model's layers; the first ones keep the embeddings, the last ones the final norm."""
    if hasattr(base, "encoder"):
        base.encoder.layer = base.encoder.layer[layers]
        if not first:
            base.embeddings.forward = lambda inputs_embeds=None, **_: inputs_embeds
    else:
        base.layers = base.layers[layers]
        if first:
            base.norm = nn.Identity()


@pytest.mark.parametrize("kind", ["lora", "bitfit", "full"])
def test_changes_of_weights_start_at_the_pretrained_model(world, kind):
    backbone, tuning, _ = tuned(world, "roberta", kind)
    params = {key: torch.from_numpy(tensor).double() for key, tensor in tuning.initial(1).items()}
    batch = make_batch("roberta")
    plain = load_plain(world / "roberta", "roberta")
    expected = at_slots(plain(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits, batch)
    assert_same(tuning.forward(backbone, [params], batch), expected)
    if kind == "lora":
        a = tuning.initial(1)["lora_A.attention.self.query"]
        assert a.std() == pytest.approx((3 * HIDDEN_SIZE) ** -0.5, rel=0.15)  # 288 draws: 4 % standard error


def test_without_layers_says_which_have_none(world):
    for kind in TUNINGS:
        _, tuning, _ = tuned(world, "bert", kind)
        assert bool(tuning.per_layer) == (TUNINGS[kind].has_layers)


def test_full_tuning_has_every_parameter(world):
    _, _, params = tuned(world, "roberta", "full")
    plain = load_plain(world / "roberta", "roberta")
    assert sum(p.numel() for p in params.values()) == sum(p.numel() for p in plain.base_model.parameters())
    assert params["model.embeddings.word_embeddings.weight"].shape == (VOCABULARY, HIDDEN_SIZE)


def test_late_prompt_refuses_layers_that_are_not_in_the_middle(world):
    with pytest.raises(ConfigError, match=r"layer: 3 is not in the middle of 3 layers; valid: 1 to 2"):
        tuned(world, "bert", "late_prompt", layer=3)


def test_attempt_names_a_source_that_does_not_fit(world, tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_tuning(world / "bert", kind="attempt", sources=[str(tmp_path / "nowhere")])
    os.mkfifo(tmp_path / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match="cannot be read: it is no plain file"):
        read_tuning(world / "bert", kind="attempt", sources=[str(tmp_path)])
    with pytest.raises(
        ConfigError, match=rf"a prompt of \({NUM_TOKENS}, {HIDDEN_SIZE}\); \(9, {HIDDEN_SIZE}\) is needed"
    ):
        read_tuning(world / "bert", kind="attempt", num_tokens=9, sources=[str(world / "source0")])
