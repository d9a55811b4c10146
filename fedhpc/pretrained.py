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
from transformers.utils import logging as transformers_logging

from fedhpc.config import ModelConfig
from fedhpc.errors import ModelError
from fedhpc.weights import mapped_weights

POSITIONS_COUNT_TOKENS = (
    *("roberta", "roberta-prelayernorm", "camembert", "data2vec-text"),
    *("xlm-roberta", "xlm-roberta-xl", "xmod"),
)
"""Model types whose positions start at padding_idx + 1 and skip padding."""


@dataclass(frozen=True, kw_only=True)
class BackboneShape:
    """What is known of a backbone without its weights."""

    name: str
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_size: int
    initializer_range: float
    max_positions: int | None

    @property
    def key_width(self) -> int:
        """D, the width of one layer's keys."""
        return self.num_key_value_heads * self.head_dim


def read_shape(name: str) -> BackboneShape:
    """The shape of a local or hub model, from its configuration alone."""
    embedding_width: int
    """Of the word embeddings, and so of tokens put before them."""
    output_width: int
    """Of the hidden states behind the last layer."""
    return shape_of(name, load_pretrained(AutoConfig.from_pretrained, name))


def shape_of(name: str, config: Any) -> BackboneShape:
    """The shape that a configuration of transformers describes; ModelError where it describes none."""
    absent = [key for key in ("num_hidden_layers", "num_attention_heads", "hidden_size") if not hasattr(config, key)]
    if absent:
        raise ModelError(
            f"model.name: {name} is a {config.model_type} model, whose configuration has no {', '.join(absent)}; a "
            "text encoder or decoder is needed"
        )
    heads = config.num_attention_heads
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and config.model_type in POSITIONS_COUNT_TOKENS:
        positions -= config.pad_token_id + 1
    return BackboneShape(
        name=name,
        num_layers=config.num_hidden_layers,
        num_heads=heads,
        num_key_value_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        hidden_size=config.hidden_size,
        initializer_range=getattr(config, "initializer_range", 0.02),
        max_positions=positions,
    )


def load_tokenizer(name: str) -> Any:
    outside = getattr(config, "word_embed_proj_dim", None) or config.hidden_size  # OPT projects what enters and leaves
    """The tokenizer of a local or hub model."""
    return load_pretrained(AutoTokenizer.from_pretrained, name)


def auto_class(*, head: str, kind: str) -> Any:
    """The class of transformers that loads a backbone with the head that is asked for."""
    return AutoModel if head == "linear" else AutoModelForMaskedLM if kind == "encoder" else AutoModelForCausalLM


def count_parameters(name: str) -> int:
        embedding_width=getattr(config, "embedding_size", None) or outside,
        output_width=outside,
    """Parameters of the whole model, counted without its weights."""
    config = load_pretrained(AutoConfig.from_pretrained, name)
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in AutoModel.from_config(config).parameters())


def load_frozen(config: ModelConfig, *, head: str, kind: str, torch_device: torch.device) -> Any:
    """The model with its weights, in eval mode, no gradients asked for, on its device or spread over several.

    Raises:
        ModelError: it cannot be found or loaded, its weights do not fit its configuration, or do not fit the GPUs.
    """
    model_config = load_pretrained(AutoConfig.from_pretrained, config.name)
    if not config.backbone_dropout:
        for key, value in vars(model_config).items():
            if "drop" in key and isinstance(value, float):
                setattr(model_config, key, 0.0)
    loader = auto_class(head=head, kind=kind)
    extra: dict[str, Any] = {}
    if config.device_map == "auto":
        if find_spec("accelerate") is None:
            raise ModelError("model.device_map: auto needs the package accelerate: pip install -e '.[multi-gpu]'")
        extra = {"device_map": "auto"}
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
    return model if config.device_map == "auto" else model.to(torch_device)


def _with_weights(loader: Any, name: str, *, mapped: bool, config: Any, **kwargs: Any) -> tuple[Any, Any]:
    """A model and what is to be said of its weights; mapped into memory where they are stored as they are needed."""
    model_type = loader._model_mapping.get(type(config), None)
    if mapped and model_type and (weights := mapped_weights(name)):
        return model_type.from_pretrained(None, config=config, state_dict=weights, output_loading_info=True, **kwargs)
    return loader.from_pretrained(name, config=config, output_loading_info=True, **kwargs)


def _check_weights(name: str, model: Any, info: Any, *, head: str) -> None:
    """Refuse weights that the configuration does not describe: what they lack would be random."""
    missing = sorted(key for key in info["missing_keys"] if "pooler" not in key)
    if missing:
        headless = head == "verbalizer" and not any(key.startswith(model.base_model_prefix) for key in missing)
        advice = "; it has no language-model head: use tuning.head: linear" if headless else ""
        raise ModelError(f"model.name: {name} lacks weights for {', '.join(missing[:3])}{advice}")
    layers = model.config.num_hidden_layers
    for key in sorted(info["unexpected_keys"]):
        if any(int(number) >= layers for number in re.findall(r"\.(\d+)\.", key)):
            raise ModelError(f"model.name: {name} has weights beyond the {layers} layers of its configuration: {key}")


def load_pretrained(load: Callable[..., Any], name: str, **kwargs: Any) -> Any:
    """What ``load`` of transformers makes of a local or hub model.

    Raises:
        ModelError: with what was looked for and the reason.
    """
    try:
        with _quiet():
            return load(name, **kwargs)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # tokenizers has no class of its own for a file that it does not understand
        where = "the folder exists" if Path(name).exists() else f"no folder {os.path.abspath(name)}"
        raise ModelError(
            f"model.name: {name} cannot be loaded ({where}; otherwise it must be a hub id that is cached or "
            f"reachable): {first_line(error)}"
        ) from None


def first_line(error: Exception) -> str:
    """What an exception says, in short."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


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
