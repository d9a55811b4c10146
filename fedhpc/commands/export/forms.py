"""How PEFT holds each tuning: its configuration and tensors.

PEFT: https://huggingface.co/docs/peft/developer_guides/checkpoint. Shapes: L layers, T prompt tokens, D key width, E
width of the word embeddings, r rank.
"""

import inspect
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save
from transformers.pytorch_utils import Conv1D

from fedhpc.commands.trained import Trained
from fedhpc.errors import ConfigError, ModelError
from fedhpc.model.pretrained import POSITIONS_COUNT_TOKENS, load_pretrained
from fedhpc.model.structure import outline, read_structure
from fedhpc.model.weight_files import weights_sha256
from fedhpc.tuning.attempt import BACKBONE_SHA256


@dataclass(frozen=True, kw_only=True)
class PeftForm:
    """An adapter as PEFT saves it."""

    config: dict[str, Any]
    """adapter_config.json."""
    tensors: dict[str, np.ndarray]
    """adapter_model.safetensors."""
    backbone_sha256: str = ""
    first_position: int | None = None
    """Of a text, to be passed to the model; None: what it takes by itself."""
    output_offset: int = 0
    """Where a text begins in the model's output."""

    @property
    def files(self) -> dict[str, bytes]:
        """The files that PEFT reads, by name."""
        tensors = {name: np.ascontiguousarray(tensor) for name, tensor in self.tensors.items()}
        return {
            "adapter_config.json": (json.dumps(self.config, indent=2, sort_keys=True) + "\n").encode(),
            "adapter_model.safetensors": save(tensors, {"format": "pt", BACKBONE_SHA256: self.backbone_sha256}),
        }


def peft_form(trained: Trained) -> PeftForm:
    """The adapter for a run's tuned parameters.

    Raises:
        ConfigError: PEFT has no form for the tuning, or computes something else with it.
        ModelError: PEFT cannot put this tuning on the backbone.
    """
    job = trained.job
    tuning, name, kind = job.config.tuning, job.config.model.name, job.data.description.kind
    if tuning.kind not in FORMS:
        raise ConfigError(f"tuning.kind: {tuning.kind} cannot be exported: PEFT holds {', '.join(FORMS)} only")
    form = FORMS[tuning.kind](trained, outline(name, head=tuning.head, kind=kind))
    causal = (tuning.head, kind) == ("verbalizer", "decoder")
    general = {
        "base_model_name_or_path": os.path.abspath(name) if Path(name).exists() else name,
        "inference_mode": True,
        # PEFT has no task of masked words; FEATURE_EXTRACTION takes any model, and hands on what it puts out.
        "task_type": "CAUSAL_LM" if causal else "FEATURE_EXTRACTION",
    }
    return replace(form, config={**general, **form.config}, backbone_sha256=load_pretrained(weights_sha256, name))


def _prefix(trained: Trained, model: Any) -> PeftForm:
    """Prefix tuning: `prompt_embeddings` [T, L * 2 * D] from `prompts` [L, 2, T, D]."""
    prompts = trained.tensors["prompts"]
    num_layers, _, num_tokens, width = prompts.shape
    _check_prefix(trained, model, num_tokens)
    first_position = None
    if not trained.job.config.tuning.position_offset:
        # PEFT adds T to positions that it is given.
        counts = model.config.model_type in POSITIONS_COUNT_TOKENS
        first_position = (model.config.pad_token_id + 1 if counts else 0) - num_tokens
    return PeftForm(
        config={
            "peft_type": "PREFIX_TUNING",
            "num_layers": num_layers,
            "num_virtual_tokens": num_tokens,
            "token_dim": width,
            "num_attention_heads": trained.job.shape.num_key_value_heads,
            "num_transformer_submodules": 1,
            "prefix_projection": False,
        },
        tensors={"prompt_embeddings": prompts.transpose(2, 0, 1, 3).reshape(num_tokens, -1)},
        first_position=first_position,
    )


def _check_prefix(trained: Trained, model: Any, num_tokens: int) -> None:
    who = f"model.name: {trained.job.config.model.name}: PEFT's prefix tuning"
    if "past_key_values" not in inspect.signature(model.base_model.forward).parameters:
        raise ModelError(
            f"{who} hands prompts over as past_key_values, which a {model.config.model_type} model does not take"
        )
    window = trained.job.shape.sliding_window
    longest = trained.max_length + num_tokens
    if window is not None and longest > window:
        raise ModelError(
            f"{who} counts prompts into the window of {window} positions, but texts and prompts have up to {longest}; "
            "prepare the data with a smaller --max-length"
        )


def _prompt_tuning(trained: Trained, model: Any) -> PeftForm:
    """Prompt tuning: `prompt_embeddings` [T, E], the tuning's `tokens`."""
    tokens = trained.tensors["tokens"]
    num_tokens, width = tokens.shape
    return PeftForm(
        config={
            "peft_type": "PROMPT_TUNING",
            "num_virtual_tokens": num_tokens,
            "token_dim": width,
            "num_layers": trained.job.shape.num_layers,
            "num_attention_heads": trained.job.shape.num_heads,
            "num_transformer_submodules": 1,
        },
        tensors={"prompt_embeddings": tokens},
        output_offset=num_tokens,
    )


def _lora(trained: Trained, model: Any) -> PeftForm:
    """LoRA: `lora_A` [r, in] and `lora_B` [out, r] of each module from those of all layers [L, ...]."""
    structure, tuning = read_structure(trained.job.config.model.name), trained.job.config.tuning
    modules = [name.removeprefix("lora_A.") for name in trained.tensors if name.startswith("lora_A.")]
    inside = "" if model.base_model is model else f"{model.base_model_prefix}."
    layers = [f"{inside}{layer}" for layer in structure.layers]
    return PeftForm(
        config={
            "peft_type": "LORA",
            "r": tuning.rank,
            "lora_alpha": tuning.alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": [f"{layer}.{module}" for layer in layers for module in modules],
            "fan_in_fan_out": isinstance(model.get_submodule(f"{layers[0]}.{modules[0]}"), Conv1D),
        },
        tensors={
            f"base_model.model.{layer}.{module}.lora_{part}.weight": trained.tensors[f"lora_{part}.{module}"][index]
            for index, layer in enumerate(layers)
            for module in modules
            for part in "AB"
        },
    )


FORMS: dict[str, Callable[[Trained, Any], PeftForm]] = {
    "prompt": _prefix,
    "prompt_tuning": _prompt_tuning,
    "lora": _lora,
}
