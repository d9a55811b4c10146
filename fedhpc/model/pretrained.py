"""What transformers has stored of a model: its configuration, tokenizer and weights."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
)
from transformers.utils import CONFIG_NAME, is_flash_attn_2_available, is_flash_attn_3_available
from transformers.utils import logging as transformers_logging

from fedhpc.config.sections import ModelConfig
from fedhpc.data.tokenizer_files import tokenizer_advice
from fedhpc.errors import ModelError, first_line
from fedhpc.model.quantization import keep_layout, quantization_arguments
from fedhpc.model.weight_files import mapped_weights

POSITIONS_COUNT_TOKENS = (
    *("roberta", "roberta-prelayernorm", "camembert", "data2vec-text"),
    *("xlm-roberta", "xlm-roberta-xl", "xmod"),
)
"""Model types whose positions start at padding_idx + 1 and skip padding."""
LINEAR_HEAD = "prepare the data with --head linear and set tuning.head: linear"
KERNELS = {
    "sdpa": ("_supports_sdpa", lambda: True),
    "flash_attention_2": ("_supports_flash_attn", is_flash_attn_2_available),
    "flash_attention_3": ("_supports_flash_attn", is_flash_attn_3_available),
}
"""Attention kernels: the flag of the model classes that can use one, and whether it can be used here."""


@dataclass(frozen=True, kw_only=True)
class BackboneShape:
    """What is known of a backbone without its weights."""

    name: str
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_size: int
    embedding_width: int
    """Width of the word embeddings, and so of tokens put before them."""
    output_width: int
    """Width of the hidden states behind the last layer."""
    initializer_range: float
    max_positions: int | None
    sliding_window: int | None = None
    """Positions that a layer attends to at a time, where that is not all of them."""
    vocabulary_size: int | None = None
    """Rows of the word embeddings."""

    @property
    def key_width(self) -> int:
        """D, the width of one layer's keys."""
        return self.num_key_value_heads * self.head_dim


def read_shape(name: str) -> BackboneShape:
    """The shape of a local or hub model, from its configuration alone."""
    return shape_of(name, load_pretrained(AutoConfig.from_pretrained, name))


def shape_of(name: str, config: Any) -> BackboneShape:
    """The shape that a configuration of transformers describes; ModelError where it describes none."""
    if config.is_encoder_decoder:
        raise ModelError(
            f"model.name: {name} is a {config.model_type} model, an encoder-decoder; only encoders and decoders can be "
            "tuned"
        )
    absent = [key for key in ("num_hidden_layers", "num_attention_heads", "hidden_size") if not hasattr(config, key)]
    if absent:
        raise ModelError(
            f"model.name: {name} is a {config.model_type} model, whose configuration has no {', '.join(absent)}; a "
            "text encoder or decoder with attention is needed"
        )
    heads = config.num_attention_heads
    outside = getattr(config, "word_embed_proj_dim", None) or config.hidden_size  # OPT projects what enters and leaves
    positions = getattr(config, "max_position_embeddings", getattr(config, "max_seq_len", None))  # the latter: MPT
    if positions is not None and config.model_type in POSITIONS_COUNT_TOKENS:
        positions -= config.pad_token_id + 1
    windows = [getattr(layer, "sliding_window", None) for layer in getattr(config, "per_layer_config", [config])]
    return BackboneShape(
        name=name,
        num_layers=config.num_hidden_layers,
        num_heads=heads,
        num_key_value_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        hidden_size=config.hidden_size,
        embedding_width=getattr(config, "embedding_size", None) or outside,
        output_width=outside,
        initializer_range=getattr(config, "initializer_range", 0.02),
        max_positions=positions,
        sliding_window=min(filter(None, windows), default=None),
        vocabulary_size=getattr(config, "vocab_size", None),
    )


def config_values(name: str) -> dict[str, Any]:
    """A local or hub model's configuration, with the values of what its config.json leaves out."""
    return dict(load_pretrained(AutoConfig.from_pretrained, name).to_dict())


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a local or hub model."""
    return load_pretrained(AutoTokenizer.from_pretrained, name, advice=tokenizer_advice)


def auto_class(*, head: str, kind: str) -> Any:
    """The class of transformers that loads a backbone with the head that is asked for."""
    return AutoModel if head == "linear" else AutoModelForMaskedLM if kind == "encoder" else AutoModelForCausalLM


def count_parameters(name: str) -> int:
    """Parameters of the whole model, counted without its weights."""
    config = load_pretrained(AutoConfig.from_pretrained, name)
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in AutoModel.from_config(config).parameters())


def run_config(config: ModelConfig) -> Any:
    """The model's configuration as a run uses it: without dropout, unless it is asked for."""
    model_config = load_pretrained(AutoConfig.from_pretrained, config.name)
    if not config.backbone_dropout:
        for key, value in vars(model_config).items():
            if "drop" in key and isinstance(value, float):
                setattr(model_config, key, 0.0)
    return model_config


def load_frozen(config: ModelConfig, *, head: str, kind: str, torch_device: torch.device) -> Any:
    """The model with its weights, in eval mode, no gradients asked for, on its device or spread over several.

    Raises:
        ModelError: it cannot be found or loaded, its weights do not fit its configuration, or do not fit the GPUs.
    """
    model_config, loader = run_config(config), auto_class(head=head, kind=kind)
    _check_kernel(config, model_config, loader)
    extra = quantization_arguments(config, torch_device)
    if config.device_map == "auto":
        if find_spec("accelerate") is None:
            raise ModelError("model.device_map: auto needs the package accelerate: pip install accelerate")
        extra["device_map"] = "auto"
    model, info = load_pretrained(
        partial(_with_weights, loader, mapped=not extra),
        config.name,
        config=model_config,
        dtype=getattr(torch, config.dtype),
        attn_implementation=config.attention,
        **extra,
    )
    _check_weights(config.name, model, info, head=head)
    outside = {"cpu", "disk"} & {str(place) for place in getattr(model, "hf_device_map", {}).values()}
    if outside and torch_device.type != "cpu":
        raise ModelError(f"model.name: {config.name} does not fit on the GPUs that this rank sees; use more of them")
    model.requires_grad_(False)
    model.eval()
    keep_layout(model)
    return model if extra else model.to(torch_device)


def _check_kernel(config: ModelConfig, model_config: Any, loader: Any) -> None:
    """Refuse an attention kernel that transformers does not have for a model, or that cannot be used here."""
    model_types = _model_types(loader, model_config)
    has = [kernel for kernel, (flag, _) in KERNELS.items() if all(getattr(each, flag, False) for each in model_types)]
    other = next((kernel for kernel in has if kernel != config.attention), None)
    advice = f"use model.attention: {other}" if other else "choose another model"
    if model_types and config.attention not in has:
        needs = ", which needs its own package and a GPU" if other else ""
        raise ModelError(
            f"model.name: {config.name}: transformers has no {config.attention} attention for a "
            f"{model_config.model_type} model; {advice}{needs}"
        )
    if not KERNELS[config.attention][1]():
        raise ModelError(
            f"model.attention: {config.attention} needs its own package and a GPU that it runs on; {advice}"
        )
    if config.attention != "sdpa" and config.dtype == "float32":
        raise ModelError(f"model.attention: {config.attention} needs model.dtype: bfloat16 or float16")


def _model_types(loader: Any, model_config: Any) -> tuple[Any, ...]:
    """The classes that ``loader`` may make a model of; none where transformers itself has none."""
    found = loader._model_mapping.get(type(model_config), ())
    return found if isinstance(found, tuple) else (found,)


def _with_weights(
    loader: Any, name: str, *, mapped: bool, config: Any, dtype: torch.dtype, **kwargs: Any
) -> tuple[Any, Any]:
    """A model and what is to be said of its weights; mapped into memory where they are stored as they are needed."""
    model_types = _model_types(loader, config)
    kwargs |= {"config": config, "dtype": dtype, "output_loading_info": True}
    if mapped and len(model_types) == 1 and (weights := mapped_weights(name, dtype)):
        return model_types[0].from_pretrained(None, state_dict=weights, **kwargs)
    return loader.from_pretrained(name, **kwargs)


def _check_weights(name: str, model: Any, info: Any, *, head: str) -> None:
    """Refuse weights that the configuration does not describe: what they lack would be random."""
    missing = sorted(key for key in info["missing_keys"] if "pooler" not in key)
    if missing:
        headless = head == "verbalizer" and not any(key.startswith(model.base_model_prefix) for key in missing)
        advice = f"; it has no language-model head: {LINEAR_HEAD}" if headless else ""
        raise ModelError(f"model.name: {name} lacks weights for {', '.join(missing[:3])}{advice}")
    layers = model.config.num_hidden_layers
    for key in sorted(info["unexpected_keys"]):
        if any(int(number) >= layers for number in re.findall(r"\.(\d+)\.", key)):
            raise ModelError(f"model.name: {name} has weights beyond the {layers} layers of its configuration: {key}")


def load_pretrained(
    load: Callable[..., Any], name: str, *, advice: Callable[[str], str] = lambda _name: "", **kwargs: Any
) -> Any:
    """What ``load`` of transformers makes of a local or hub model.

    Args:
        advice: a better reason than the exception's for the same model, or an empty text.

    Raises:
        ModelError: with what was looked for and the reason.
    """
    try:
        with _quiet():
            Path(name, CONFIG_NAME).exists()  # of a folder that is closed to us, transformers says that it is empty
            return load(name, **kwargs)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # tokenizers has no class of its own for a file that it does not understand
        where = "the folder exists" if Path(name).exists() else f"no folder {os.path.abspath(name)}"
        raise ModelError(
            f"model.name: {name} cannot be loaded ({where}; otherwise it must be a hub id that is cached or "
            f"reachable): {advice(name) or first_line(error)}"
        ) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and warnings of transformers: every rank would print them."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
