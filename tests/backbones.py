"""Tiny backbones with large random weights, and batches, descriptions and configurations for them."""

import numpy as np
import torch
from torch.nn import functional
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from fedhpc.config import Config, section_of
from fedhpc.config.sections import ModelConfig
from fedhpc.data.prepared import Batch, Description
from fedhpc.model.backbone import Backbone
from fedhpc.model.overlay import Overlay
from fedhpc.model.pretrained import read_shape
from fedhpc.registry import TUNINGS
from fedhpc.tuning import make_tuning

NUM_LAYERS, HIDDEN_SIZE, VOCABULARY, NUM_TOKENS = 3, 32, 101, 4
WORDS = [[7], [41], [90]]
LONG_WORDS = [[7, 12], [41], [7, 55, 3], [90, 90]]
ENCODERS = ("bert", "roberta")
DECODERS = ("gpt2", "llama", "llama-gqa", "qwen2", "qwen3", "mistral")

_CPU = torch.device("cpu")
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN_SIZE,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
_GROUPED = {"intermediate_size": 48, "num_key_value_heads": 2}
_ARCHITECTURES = {
    "bert": (BertForMaskedLM, BertConfig, {"intermediate_size": 48}),
    "roberta": (RobertaForMaskedLM, RobertaConfig, {"intermediate_size": 48, "type_vocab_size": 1}),
    "gpt2": (GPT2LMHeadModel, GPT2Config, {}),
    "llama": (LlamaForCausalLM, LlamaConfig, {"intermediate_size": 48}),
    "llama-gqa": (LlamaForCausalLM, LlamaConfig, _GROUPED),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, _GROUPED),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {**_GROUPED, "head_dim": 16, "tie_word_embeddings": True}),
    "mistral": (MistralForCausalLM, MistralConfig, {**_GROUPED, "head_dim": 8, "sliding_window": 48}),
    "opt": (OPTForCausalLM, OPTConfig, {"ffn_dim": 48, "word_embed_proj_dim": HIDDEN_SIZE}),
}


def save_backbone(folder, name, **changes):
    """Write a backbone whose every parameter is random, with standard deviation 0.2; its folder."""
    model_class, config_class, more = _ARCHITECTURES[name]
    torch.manual_seed(7)
    model = model_class(config_class(**{**_COMMON, **more, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    path = folder / name
    model.save_pretrained(path)
    return path


def load_plain(path, name, dtype=torch.float64):
    """The same backbone as transformers itself runs it, with its plain attention."""
    return _ARCHITECTURES[name][0].from_pretrained(path, dtype=dtype, attn_implementation="eager").eval()


def load_backbone(path, name, *, words=None, kind="prompt", loss="verbalizer", head="verbalizer", longest=12, **model):
    """The same backbone as fedhpc runs it."""
    words = [[] for _ in WORDS] if head == "linear" else words or WORDS
    words = [] if head == "language_model" else words
    return Backbone(
        ModelConfig(name=str(path), **model),
        section_of(TUNINGS, kind=kind, loss=loss, head=head, num_tokens=NUM_TOKENS),
        describe(name, words=words, head=head, longest=longest),
        _CPU,
    )


def describe(name, *, words=None, head="verbalizer", longest=12):
    words = WORDS if words is None else words
    return Description(
        task="toy",
        head=head,
        kind=kind_of(name),
        model=name,
        tokenizer_sha256="0" * 64,
        pad_id=1,
        max_length=longest,
        template="",
        class_names=[str(c) for c in range(len(words))],
        class_words=[str(c) for c in range(len(words))],
        word_ids=words,
        metric="accuracy",
        splits={"train": {"longest": longest}},
        files={},
    )


def kind_of(name):
    return "encoder" if name in ENCODERS else "decoder"


def make_batch(name, lengths=(9, 4, 7), *, seed=3, num_classes=3):
    """Random examples; an encoder's slot is anywhere in the text, a decoder's at its end."""
    rng = torch.Generator().manual_seed(seed)
    size = torch.tensor(lengths)
    mask = torch.arange(max(lengths)) < size[:, None]
    ids = torch.randint(4, VOCABULARY, mask.shape, generator=rng)
    slots = size - 1 if kind_of(name) == "decoder" else size // 2
    labels = torch.arange(len(lengths)) % num_classes
    ids = ids.where(mask, 1)
    return Batch(
        input_ids=ids,
        attention_mask=mask,
        slots=slots,
        labels=labels,
        sizes=(len(lengths),),
        lengths=np.array(lengths),
    )


def random_prompts(backbone_config, dtype=torch.float32, *, num_tokens=NUM_TOKENS, std=0.7):
    """Prompts [L, 2, T, D] for a transformers configuration."""
    heads = getattr(backbone_config, "num_key_value_heads", None) or backbone_config.num_attention_heads
    head_dim = getattr(backbone_config, "head_dim", None) or HIDDEN_SIZE // backbone_config.num_attention_heads
    rng = torch.Generator().manual_seed(11)
    prompts = torch.randn(NUM_LAYERS, 2, num_tokens, heads * head_dim, generator=rng, dtype=torch.float64) * std
    return prompts.to(dtype).requires_grad_()


def with_prompts(prompts, first_position=0):
    """What one device's prompts [L, 2, T, D] add to a forward pass."""
    return Overlay(prompts=prompts[None].unbind(1), first_position=first_position)


def read_tuning(path, *, num_classes=3, **tuning):
    """The tuning of a saved backbone."""
    config = section_of(TUNINGS, **{"num_tokens": NUM_TOKENS, **tuning})
    return make_tuning(config, read_shape(str(path)), num_classes=num_classes)


def cached_logits(model, ids, mask, prompts, positions=None):
    """Logits [b, s, V] with the prompts in transformers' own cache, as keys and values of earlier positions."""
    layers, _, num_tokens, width = prompts.shape
    heads = getattr(model.config, "num_key_value_heads", None) or model.config.num_attention_heads
    cache = DynamicCache(config=model.config)
    for layer in range(layers):
        states = prompts[layer].view(2, 1, num_tokens, heads, width // heads).transpose(2, 3)
        key, value = states.expand(2, len(ids), -1, -1, -1)
        cache.update(key, value, layer)
    whole_mask = functional.pad(mask.long(), (num_tokens, 0), value=1)
    return model(input_ids=ids, attention_mask=whole_mask, past_key_values=cache, position_ids=positions).logits


def make_config(path, **sections):
    """A whole run's configuration for a backbone's folder."""
    sections["model"] = {"name": str(path), **sections.get("model", {})}
    sections["tuning"] = {"num_tokens": NUM_TOKENS, **sections.get("tuning", {})}
    return Config.model_validate({"run_dir": "unused", "data": {"path": "unused"}, **sections})
