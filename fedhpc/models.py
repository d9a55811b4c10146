"""The frozen backbone: its forward pass with what a tuning lays over it, and scores of the classes.

Shapes: N devices, b examples, s positions, L layers, T prompt tokens per layer, D key width, H hidden size, C classes,
V words.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from transformers.modeling_layers import GradientCheckpointingLayer

from fedhpc import attention
from fedhpc.answers import Answers
from fedhpc.config import ModelConfig, TuningConfig
from fedhpc.data import Batch, Description
from fedhpc.errors import ModelError, UserError
from fedhpc.last_layer import LastLayer
from fedhpc.overlay import Hooks, Overlay, SoftTokens, with_tokens
from fedhpc.pretrained import POSITIONS_COUNT_TOKENS, BackboneShape, first_line, load_frozen, shape_of

attention.register()

NOTHING = Overlay()
LOSS_SCALE = 2.0**12
"""A power of two rounds nothing. Gradients of one example in a batch begin near 1e-3, and float16 ends at 6e-8."""


class Backbone(nn.Module):
    """A frozen backbone and what turns its hidden states into class scores."""

    def __init__(self, config: ModelConfig, tuning: TuningConfig, data: Description, torch_device: torch.device):
        super().__init__()
        self.kind = data.kind
        self.answers = Answers(data.word_ids, full_vocabulary=tuning.loss == "vocabulary")
        self._has_dropout, self._recomputes = config.backbone_dropout, config.gradient_checkpointing
        self.model = load_frozen(config, head=data.head, kind=data.kind, torch_device=torch_device)
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
        self._check(config, tuning)
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

    def gradients(
        self, loss: Tensor, inputs: Sequence[Tensor], *, create_graph: bool = False, retain_graph: bool | None = None
    ) -> list[Tensor]:
        """Of a loss. In float16 they pass the backbone enlarged, where most of a small one would become zero."""
        differentiate = partial(torch.autograd.grad, create_graph=create_graph, retain_graph=retain_graph)
        if self.base.dtype != torch.float16:
            return list(differentiate(loss, inputs))
        enlarged = differentiate(LOSS_SCALE * loss, inputs)
        return [at_least_float32(gradient) / LOSS_SCALE for gradient in enlarged]

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
        ids, mask, count = inputs.pop("input_ids"), inputs["attention_mask"], tokens.count
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        words, causal = self.base.get_input_embeddings()(ids), self.kind == "decoder"
        num_answer_tokens = ids.shape[1] - batch.input_ids.shape[1]
        in_text = functional.pad(batch.attention_mask, (0, num_answer_tokens)).unsqueeze(-1)
        first = ids.new_ones(len(ids), count)
        inputs["position_ids"] = torch.cat([self._positions(first, first, 0), inputs["position_ids"]], dim=1)

        def put_first(text: Tensor) -> Tensor:
            return torch.cat([tokens.make(text, in_text).to(text), text], dim=1)

        if tokens.layer == 0:
            if num_answer_tokens:
                mask = with_tokens(mask, count, visible=True, causal=causal)
            else:
                mask = functional.pad(mask, (count, 0), value=1)
            return {**inputs, "inputs_embeds": put_first(words), "attention_mask": mask}, None
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
    def _check(self, config: ModelConfig, tuning: TuningConfig) -> None:
        """Refuse what would give wrong numbers without an error; what a tuning needs, `Tuning.check` looks for."""
        who = f"model.name: {config.name}: a {self.base.config.model_type} model"
        no_padding = int(getattr(self.base.config, "pad_token_id", None) == 0)  # which has a position of its own
        ids = torch.full((1, 2), no_padding, device=self.torch_device)
        mask = torch.ones_like(ids, dtype=torch.bool)
        batch = Batch(input_ids=ids, attention_mask=mask, slots=ids[:, 0], labels=ids[:, 0], sizes=(1,))
        with no_surprise(f"{who} cannot be used"):
            ours = self.hidden(batch)
            if self.word_head is not None:
                ours = self._logits(ours)
            theirs = self.model(input_ids=ids, attention_mask=mask)[0].to(ours)
        if not torch.allclose(ours, theirs, rtol=0.05, atol=0.05, equal_nan=True):
            raise ModelError(
                f"{who} numbers its positions as fedhpc does not know, or changes its logits behind its language-model "
                "head; neither is supported"
            )
        if self.word_head is None:
            return
        if self.answers.branch_tokens:
            self._check_branches(who)
        if config.attention == "sdpa":
            self._narrow_last_layer(shape_of(config.name, self.base.config), with_prompts=tuning.kind == "prompt")

    def _check_branches(self, who: str) -> None:
        """Refuse a model in which answers of several tokens see each other, or what is behind a short text."""
        ids = torch.tensor([[0, 1], [1, 0]], device=self.torch_device)
        mask = torch.tensor([[True, True], [True, False]], device=self.torch_device)
        slots = mask.sum(1) - 1
        both = self.word_scores(Batch(input_ids=ids, attention_mask=mask, slots=slots, labels=slots, sizes=(2,)))
        short = Batch(input_ids=ids[1:, :1], attention_mask=mask[1:, :1], slots=slots[1:], labels=slots[1:], sizes=(1,))
        given, self.answers = self.answers, Answers(self.answers.word_ids[::-1], full_vocabulary=True)
        reversed_alone = self.word_scores(short).flip(1)
        self.answers = given
        if not torch.allclose(both[1:], reversed_alone, rtol=0.02, atol=0.02):
            raise ModelError(
                f"{who} does not only look where the attention mask says, and so cannot score class words of several "
                "tokens; choose words of one token each"
            )

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
        same = False
        # What raises here does so in `Tuning.check` too, or in nothing that is asked for.
        with suppress(AttributeError, RuntimeError, TypeError, ValueError, IndexError):
            wanted = [self._at_slots(batch, overlay) for overlay in overlays]
            self._last_layer = LastLayer(self._layers[-1])
            found = [self._at_slots(batch, overlay) for overlay in overlays]
            same = torch.allclose(torch.cat(found), torch.cat(wanted), rtol=0.01, atol=0.01)
        if self._last_layer and not same:
            self._last_layer.restore()
            self._last_layer = None


def mean_over_text(hidden: Tensor, in_text: Tensor) -> Tensor:
    """The mean [b, H] of hidden states [b, s, H] where the mask [b, s, 1] is set."""
    hidden = at_least_float32(hidden)  # float16 ends at 65504
    mask = in_text.to(hidden)
    return (hidden * mask).sum(1) / mask.sum(1)


def at_least_float32(tensor: Tensor) -> Tensor:
    """16-bit numbers as float32, others as they are."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@contextmanager
def no_surprise(refusal: str) -> Iterator[None]:
    """ModelError in place of what a model raises that is not made as others are."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(f"{refusal}: {first_line(error)}") from None


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
