"""The architectures of docs/configuration.md, tiny, in what their published configurations set beside sizes."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

NUM_LAYERS, HIDDEN_SIZE = 4, 32
_COMMON = {
    "hidden_size": HIDDEN_SIZE,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "initializer_range": 0.2,
}
_GROUPED = {"num_key_value_heads": 2}
_GEMMA = {**_GROUPED, "head_dim": 16, "tie_word_embeddings": True}
_GEMMA_3 = {
    **_GEMMA,
    "query_pre_attn_scalar": 24,
    "sliding_window": 20,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
}
ENCODERS = {
    "bert": ("bert", {}),
    "roberta": ("roberta", {"type_vocab_size": 1}),
    "xlm-roberta": ("xlm-roberta", {"type_vocab_size": 1}),
    "camembert": ("camembert", {"type_vocab_size": 1}),
    "eurobert": ("eurobert", {}),
    "albert": ("albert", {"embedding_size": 16}),
    "electra": ("electra", {"embedding_size": 16}),
    "distilbert": ("distilbert", {"dim": HIDDEN_SIZE, "n_heads": 4, "n_layers": NUM_LAYERS, "hidden_dim": 48}),
    "modernbert": ("modernbert", {"local_attention": 12, "global_attn_every_n_layers": 3}),
    "nomic-bert": ("nomic_bert", {}),
}
DECODERS = {
    "gpt2": ("gpt2", {}),
    "gpt-neox": ("gpt_neox", {"rotary_pct": 0.5}),
    "opt": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": HIDDEN_SIZE}),
    "opt-350m": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "llama": ("llama", {}),
    "mistral": ("mistral", {**_GROUPED, "head_dim": 8, "sliding_window": 20}),
    "qwen2": ("qwen2", {**_GROUPED, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {**_GROUPED, "head_dim": 16}),
    "gemma": ("gemma", {**_GEMMA, "num_key_value_heads": 1}),
    "gemma3": ("gemma3_text", _GEMMA_3),
    "gemma3, soft cap": ("gemma3_text", {**_GEMMA_3, "final_logit_softcapping": 30.0}),
    "phi": ("phi", {"partial_rotary_factor": 0.5}),
    "phi3": ("phi3", {**_GROUPED, "sliding_window": 20}),
    "olmo2": ("olmo2", {}),
    "granite": (
        "granite",
        {
            **_GROUPED,
            "embedding_multiplier": 12.0,
            "logits_scaling": 8.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.2,
        },
    ),
    "smollm3": ("smollm3", {**_GROUPED, "no_rope_layers": [1, 1, 1, 0]}),
    "starcoder2": ("starcoder2", {**_GROUPED, "sliding_window": 20}),
    "glm4": ("glm4", {**_GROUPED, "head_dim": 8, "attention_bias": True}),
    "mixtral": ("mixtral", {**_GROUPED, "num_local_experts": 4}),
    "falcon": ("falcon", {}),
    "falcon, alibi": ("falcon", {"alibi": True}),
    "stablelm": ("stablelm", {"num_key_value_heads": 4, "partial_rotary_factor": 0.25, "use_qkv_bias": True}),
    "cohere": ("cohere", {**_GROUPED, "logit_scale": 0.0625}),
    "cohere2": ("cohere2", {**_GROUPED, "logit_scale": 0.25, "sliding_window": 20}),
}


def save_architecture(folder, name, vocab_size, **changes):
    """Write a model whose every parameter is random, with standard deviation 0.2; its folder."""
    model_type, more = (ENCODERS | DECODERS)[name]
    config = AutoConfig.for_model(model_type, **{**_COMMON, "vocab_size": vocab_size, **more, **changes})
    torch.manual_seed(7)
    model = (AutoModelForMaskedLM if name in ENCODERS else AutoModelForCausalLM).from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.save_pretrained(folder)
    return folder
