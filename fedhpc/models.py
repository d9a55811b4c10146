"""The frozen backbone: loading, placement, and scores of the classes.

Shapes: N devices, b examples, s positions, L layers, T prompt tokens per layer, D key width, H hidden size, C classes,
V words.
"""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging as transformers_logging

from fedhpc import attention
from fedhpc.answers import Answers
from fedhpc.config import ModelConfig, TuningConfig
from fedhpc.data import Batch, Description
from fedhpc.errors import ModelError, UserError
from fedhpc.last_layer import LastLayer
from fedhpc.overlay import Hooks, Overlay, SoftTokens, with_tokens
from fedhpc.weights import mapped_weights

attention.register()

NOTHING = Overlay()
POSITIONS_COUNT_TOKENS = ("roberta", "xlm-roberta", "camembert", "roberta-prelayernorm")
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
    return _shape(name, load_pretrained(AutoConfig.from_pretrained, name))


def _shape(name: str, config: Any) -> BackboneShape:
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
    """The tokenizer of a local or hub model."""
    return load_pretrained(AutoTokenizer.from_pretrained, name)


def auto_class(*, head: str, kind: str) -> Any:
    """The class of transformers that loads a backbone with the head that is asked for."""
    return AutoModel if head == "linear" else AutoModelForMaskedLM if kind == "encoder" else AutoModelForCausalLM


def count_parameters(name: str) -> int:
    """Parameters of the whole model, counted without its weights."""
    config = load_pretrained(AutoConfig.from_pretrained, name)
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in AutoModel.from_config(config).parameters())


class Backbone(nn.Module):
    """A frozen backbone and what turns its hidden states into class scores."""

    def __init__(self, config: ModelConfig, tuning: TuningConfig, data: Description, torch_device: torch.device):
        super().__init__()
        self.kind = data.kind
        self.answers = Answers(data.word_ids, full_vocabulary=tuning.loss == "vocabulary")
        self._has_dropout, self._recomputes = config.backbone_dropout, config.gradient_checkpointing
        self.model = _load_frozen(config, head=data.head, kind=data.kind, torch_device=torch_device)
        # Spread over several GPUs, the model takes its input where its embeddings are.
        self.torch_device = self.model.device if config.device_map == "auto" else torch_device
        if config.gradient_checkpointing:
            # Transformers renamed it within version 5; the old name warns where the new one exists.
            old = self.model.gradient_checkpointing_enable
            getattr(self.model, "activation_checkpointing_enable", old)({"use_reentrant": False})
        self.base: Any = self.model
        self.word_head: nn.Module | None = None
        if data.head == "verbalizer":
            self.base, self.word_head = _split_head(self.model)
        self._layers = [module for module in self.base.modules() if isinstance(module, GradientCheckpointingLayer)]
        self._hooks = Hooks(self._layers)
        self._last_layer: LastLayer | None = None
        self._check(config, tuning, data)
        if self.word_head is not None and not self.answers.needs_vocabulary:
            _keep_words(self.model, self.answers.first_tokens)

    def hidden(self, batch: Batch, overlay: Overlay = NOTHING) -> Tensor:
        """The last layer's hidden states [b, s, H] of the texts, without those of soft tokens."""
        positions = self._positions(batch.input_ids, batch.attention_mask, overlay.first_position)
        return self._run(batch.input_ids, self._mask(batch), positions, overlay, batch)

    def pooled(self, batch: Batch, overlay: Overlay = NOTHING) -> Tensor:
        """The mean of the last layer's hidden states over each text [b, H], for a trained head."""
        return mean_over_text(self.hidden(batch, overlay), batch.attention_mask.unsqueeze(-1))

    def word_scores(self, batch: Batch, overlay: Overlay = NOTHING) -> Tensor:
        """Class scores [b, C] in float32: how well each class word fits the answer slot.

        One token per word: its logit (its log-probability where the whole vocabulary is computed). Several: the mean
        log-probability of the word's tokens; all answers share one forward pass of the text.
        """
        if not self.answers.branch_tokens:
            logits = self._logits(self._at_slots(batch, overlay))
            if not self.answers.needs_vocabulary:
                return logits
            return logits.log_softmax(-1)[:, self.answers.first_tokens]
        ids, positions, mask = self.answers.branch(batch, overlay.first_position)
        hidden = self._run(ids, mask, positions, overlay, batch)
        rows = torch.arange(len(batch.slots), device=batch.slots.device)
        at_slot = hidden[rows, batch.slots].unsqueeze(1)
        in_branches = hidden[:, batch.input_ids.shape[1] :]
        log_probabilities = self._logits(torch.cat([at_slot, in_branches], dim=1)).log_softmax(-1)
        return self.answers.mean_log_probability(log_probabilities)

    @contextmanager
    def watched_embeddings(self, moved: Tensor | float = 0.0) -> Iterator[list[Tensor]]:
        """In this context, word embeddings [b, s, H] are moved so far, collected, and can be differentiated by."""
        seen: list[Tensor] = []

        def replace(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            seen.append((output + moved).detach().requires_grad_())
            return seen[-1]

        hook = self.base.get_input_embeddings().register_forward_hook(replace)
        try:
            yield seen
        finally:
            hook.remove()

    @torch.no_grad()
    def layer_outputs(self, batch: Batch) -> list[Tensor]:
        """Each layer's output [b, s, H], without prompts."""
        outputs: list[Tensor] = []

        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            outputs.append(output[0] if isinstance(output, tuple) else output)

        hooks = [layer.register_forward_hook(keep) for layer in self._layers]
        try:
            self.hidden(batch)
        finally:
            for hook in hooks:
                hook.remove()
        return outputs

    @cached_property
    def parameters_by_path(self) -> dict[str, Tensor]:
        """The frozen parameters behind the hidden states."""
        return dict(self.base.named_parameters())

    def training_mode(self, training: bool, *, dropout: bool = True) -> None:
        """Train mode only where dropout or gradient checkpointing asks for it; weights stay frozen.

        Args:
            dropout: whether there may be dropout; False for gradients that are measured, not stepped along.
        """
        asked_for = self._has_dropout or self._recomputes if dropout else self._recomputes and not self._has_dropout
        self.model.train(training and asked_for)

    def _at_slots(self, batch: Batch, overlay: Overlay) -> Tensor:
        """The last layer's hidden states at the answer slots [b, H]."""
        positions = self._positions(batch.input_ids, batch.attention_mask, overlay.first_position)
        first = overlay.tokens.count if overlay.tokens else 0
        narrow = {"slots": batch.slots + first} if self._last_layer and overlay is not NOTHING else {}
        hidden = self._run(batch.input_ids, self._mask(batch), positions, overlay, batch, **narrow)
        if narrow:
            return hidden[:, 0]
        return hidden[torch.arange(len(hidden), device=hidden.device), batch.slots]

    def _mask(self, batch: Batch) -> Tensor | None:
        """None where an encoder needs none. Without one, transformers looks for several texts in a decoder's row."""
        return batch.attention_mask if batch.is_padded or self.kind == "decoder" else None

    def _run(
        self, ids: Tensor, mask: Tensor | None, positions: Tensor, overlay: Overlay, batch: Batch, **extra: Any
    ) -> Tensor:
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **extra}
        enter, tokens = None, overlay.tokens
        if tokens is not None:
            inputs, enter = self._with_tokens(tokens, inputs, batch)
        if overlay.prompts is not None:
            inputs |= {"prompts": overlay.prompts.to(self.base.dtype), "sizes": batch.sizes}
        if self.kind == "decoder":
            inputs["use_cache"] = False
        self._hooks.set(overlay.edits, enter)
        output = (
            functional_call(self.base, dict(overlay.weights), (), inputs) if overlay.weights else self.base(**inputs)
        )
        hidden: Tensor = output.last_hidden_state.to(self.torch_device)
        return hidden[:, tokens.count :] if tokens is not None and "slots" not in extra else hidden

    def _with_tokens(
        self, tokens: SoftTokens, inputs: dict[str, Any], batch: Batch
    ) -> tuple[dict[str, Any], tuple[int, Callable[[Tensor], Tensor]] | None]:
        """The inputs with T tokens first; above the embeddings, also the layer they enter at and how."""
        ids, mask, count, causal = (
            inputs.pop("input_ids"),
            inputs["attention_mask"],
            tokens.count,
            self.kind == "decoder",
        )
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        words = self.base.get_input_embeddings()(ids)
        in_text = functional.pad(batch.attention_mask, (0, ids.shape[1] - batch.input_ids.shape[1])).unsqueeze(-1)
        first = ids.new_ones(len(ids), count)
        inputs["position_ids"] = torch.cat([self._positions(first, first, 0), inputs["position_ids"]], dim=1)

        def put_first(text: Tensor) -> Tensor:
            return torch.cat([tokens.make(text, in_text).to(text), text], dim=1)

        if tokens.layer == 0:
            square = mask.dim() == 4  # with answers of several tokens
            whole = (
                with_tokens(mask, count, visible=True, causal=causal)
                if square
                else functional.pad(mask, (count, 0), value=1)
            )
            return {**inputs, "inputs_embeds": put_first(words), "attention_mask": whole}, None
        seen, unseen = (with_tokens(mask, count, visible=visible, causal=causal) for visible in (True, False))
        reserved = functional.pad(words, (0, 0, count, 0))
        inputs |= {"inputs_embeds": reserved, "attention_mask": unseen, "later": (tokens.layer, seen)}
        return inputs, (tokens.layer, lambda hidden: put_first(hidden[:, count:]))

    def _logits(self, hidden: Tensor) -> Tensor:
        assert self.word_head is not None
        return at_least_float32(self.word_head(hidden).to(self.torch_device))

    def _positions(self, ids: Tensor, mask: Tensor, first_position: int) -> Tensor:
        if self.base.config.model_type in POSITIONS_COUNT_TOKENS:
            padding = self.base.config.pad_token_id
            return (mask.cumsum(1) + first_position) * mask + padding
        return torch.arange(first_position, first_position + ids.shape[1], device=ids.device).expand_as(ids)

    @torch.no_grad()
    def _check(self, config: ModelConfig, tuning: TuningConfig, data: Description) -> None:
        """Refuse what would give wrong numbers without an error; what a tuning needs, `Tuning.check` looks for."""
        _check_attention(self.base.config, config, tuning, data, self.answers)
        if self.word_head is None:
            return
        who = f"model.name: {config.name}: a {self.base.config.model_type} model"
        ids = torch.zeros(1, 2, dtype=torch.int64, device=self.torch_device)
        mask = torch.ones_like(ids, dtype=torch.bool)
        batch = Batch(input_ids=ids, attention_mask=mask, slots=ids[:, 0], labels=ids[:, 0], sizes=(1,))
        with no_surprise(f"{who} cannot be used"):
            ours = self._logits(self.hidden(batch))
            positions = self._positions(ids, mask, 0)
            theirs = self.model(input_ids=ids, attention_mask=mask, position_ids=positions).logits.to(ours)
        if not torch.allclose(ours, theirs, rtol=0.05, atol=0.05, equal_nan=True):
            raise ModelError(f"{who} changes its logits behind its language-model head, which is not supported")
        if config.attention == "sdpa":
            self._narrow_last_layer(_shape(config.name, self.base.config), with_prompts=tuning.kind == "prompt")

    @torch.no_grad()
    def _narrow_last_layer(self, shape: BackboneShape, *, with_prompts: bool) -> None:
        """Compute the last layer at the answer slots alone, if that gives the same numbers with this model."""
        ids = torch.arange(3, device=self.torch_device).expand(3, 3)
        mask = torch.ones_like(ids, dtype=torch.bool).tril(1)
        batch = Batch(input_ids=ids, attention_mask=mask, slots=ids[0], labels=ids[0], sizes=(3,))
        overlays = [Overlay()]
        if with_prompts:
            size = (1, shape.num_layers, 2, 1, shape.key_width)
            overlays.append(Overlay(prompts=torch.full(size, 0.1, device=self.torch_device)))
        wanted = [self._at_slots(batch, overlay) for overlay in overlays]
        self._last_layer = LastLayer(self._layers[-1])
        try:
            found = [self._at_slots(batch, overlay) for overlay in overlays]
            same = torch.allclose(torch.cat(found), torch.cat(wanted), rtol=0.01, atol=0.01)
        except (AttributeError, RuntimeError, TypeError, ValueError, IndexError):
            same = False
        if not same:
            self._last_layer.restore()
            self._last_layer = None


def mean_over_text(hidden: Tensor, in_text: Tensor) -> Tensor:
    """The mean [b, H] of hidden states [b, s, H] where the mask [b, s, 1] is set."""
    mask = in_text.to(hidden)
    return (hidden * mask).sum(1) / mask.sum(1)


def at_least_float32(tensor: Tensor) -> Tensor:
    """16-bit numbers as float32, others as they are."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _load_frozen(config: ModelConfig, *, head: str, kind: str, torch_device: torch.device) -> Any:
    model_config = load_pretrained(AutoConfig.from_pretrained, config.name)
    if not config.backbone_dropout:
        for key, value in vars(model_config).items():
            if "drop" in key and isinstance(value, float):
                setattr(model_config, key, 0.0)
    loader = auto_class(head=head, kind=kind)
    extra: dict[str, Any] = {}
    if config.device_map == "auto":
        if find_spec("accelerate") is None:
            raise ModelError("model.device_map: auto needs the package accelerate: pip install fedhpc[multi-gpu]")
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


def _check_attention(
    backbone: Any, config: ModelConfig, tuning: TuningConfig, data: Description, answers: Answers
) -> None:
    """Refuse texts and answers whose attention mask the chosen kernel or a sliding window cannot express."""
    flash = config.attention != "sdpa"
    if flash and answers.branch_tokens:
        raise ModelError(
            f"model.attention: {config.attention} cannot score class words of several tokens; use model.attention: sdpa"
        )
    window = getattr(backbone, "sliding_window", None)
    longest = max((split["longest"] for split in data.splits.values()), default=0) + tuning.tokens_in_attention
    late = tuning.kind == "late_prompt"
    if flash and late:
        raise ModelError(f"model.attention: {config.attention} takes no tuning.kind: late_prompt; use sdpa")
    if window is not None and longest > window and (flash or late or answers.branch_tokens):
        reason = f"model.attention: {config.attention}" if flash else "class words of several tokens"
        reason = "tuning.kind: late_prompt" if late else reason
        raise ModelError(
            f"model.name: {config.name} attends to {window} positions at a time, but texts and prompts have up to "
            f"{longest}; {reason} cannot handle that; prepare the data with a smaller --max-length"
        )


def _split_head(model: Any) -> tuple[nn.Module, nn.Module]:
    """The model without its head, and its language-model head."""
    heads = [module for name, module in model.named_children() if name != model.base_model_prefix]
    if len(heads) != 1:
        raise ModelError(f"model.name: {type(model).__name__} has no single language-model head; found {len(heads)}")
    return model.base_model, heads[0]


def _keep_words(model: Any, tokens: list[int]) -> None:
    """Cut the head's output down to the class words' rows: no other logit is ever computed."""
    output = model.get_output_embeddings()
    # New parameters, not a new module: embeddings may share the weight, and others hold a reference to the module.
    output.weight = nn.Parameter(output.weight[tokens], requires_grad=False)
    if output.bias is not None:
        output.bias = nn.Parameter(output.bias[tokens], requires_grad=False)
    output.out_features = len(tokens)


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
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError) as error:
        where = "the folder exists" if Path(name).exists() else f"no folder {os.path.abspath(name)}"
        raise ModelError(
            f"model.name: {name} cannot be loaded ({where}; otherwise it must be a hub id that is cached or "
            f"reachable): {_first_line(error)}"
        ) from None


@contextmanager
def no_surprise(refusal: str) -> Iterator[None]:
    """ModelError in place of what a model raises that is not made as others are."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(f"{refusal}: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
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
