"""A frozen model's forward pass with what a tuning lays over it, and scores of classes and of tokens.

Shapes: N devices, b examples, s positions, L layers, T prompt tokens per layer, D key width, H hidden size, C classes,
V words.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from transformers.modeling_layers import GradientCheckpointingLayer

from fedhpc.data.prepared import Batch
from fedhpc.model import attention
from fedhpc.model.answers import Answers
from fedhpc.model.last_layer import LastLayer
from fedhpc.model.numbers import LOSS_SCALE, at_least_float32, mean_over_text
from fedhpc.model.overlay import Hooks, Overlay, SoftTokens, with_tokens
from fedhpc.model.pretrained import POSITIONS_COUNT_TOKENS
from fedhpc.model.rows import Rows
from fedhpc.model.token_loss import plain_token_losses, token_losses, token_scores
from fedhpc.model.word_head import WordHead

attention.register()

NO_OVERLAY = Overlay()


class Forward(nn.Module):
    """A frozen model and what turns its hidden states into scores.

    Args:
        model: of transformers; with a language-model head, or as a base alone.
        kind: `encoder` or `decoder`.
        answers: the class words, where there are some.
        has_head: whether words are scored.
        torch_device: where hidden states come out.
    """

    def __init__(self, model: Any, *, kind: str, answers: Answers, has_head: bool, torch_device: torch.device) -> None:
        super().__init__()
        self.kind, self.answers, self.torch_device = kind, answers, torch_device
        self.model = model
        self.base: Any = model.base_model if has_head else model
        self._head = WordHead(model) if has_head else None
        self._layers = [module for module in self.base.modules() if isinstance(module, GradientCheckpointingLayer)]
        self.hooks = Hooks(self._layers)
        self._last_layer: LastLayer | None = None
        self._in_rows = False
        """Whether the texts of a batch lie one behind the other, so that no padding is computed."""

    def hidden(self, batch: Batch, overlay: Overlay = NO_OVERLAY) -> Tensor:
        """The last layer's hidden states [b, s, H] of the texts, without those of soft tokens."""
        positions = self._positions(batch.input_ids, batch.attention_mask, overlay.first_position)
        return self._run(batch.input_ids, self._mask(batch), positions, overlay, batch)

    def pooled(self, batch: Batch, overlay: Overlay = NO_OVERLAY) -> Tensor:
        """The mean of the last layer's hidden states over each text [b, H]; of one to be generated, over its prompt."""
        return mean_over_text(self.hidden(batch, overlay), batch.given.unsqueeze(-1))

    def word_scores(self, batch: Batch, overlay: Overlay = NO_OVERLAY) -> Tensor:
        """Class scores [b, C] in float32: how well each class word fits the answer slot.

        One token per word: its logit (its log-probability where the whole vocabulary is computed). Several: the mean
        log-probability of the word's tokens; all answers share one forward pass of the text.
        """
        if not self.answers.branch_tokens:
            logits = self._logits(self._at_slots(batch, overlay).unsqueeze(1)).squeeze(1)
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

    def token_losses(self, batch: Batch, overlay: Overlay = NO_OVERLAY, *, twice: bool = False) -> Tensor:
        """-log p of each of the batch's m trained tokens [m], in float32.

        Args:
            twice: whether it is differentiated twice; then the logits of all tokens are in memory at once.
        """
        hidden, tokens = self._predicting(batch, overlay)
        if twice:
            return plain_token_losses(self._token_logits, hidden, tokens)
        return token_losses(self._token_logits, hidden, tokens, self._num_words)

    def token_scores(self, batch: Batch, overlay: Overlay = NO_OVERLAY) -> tuple[Tensor, Tensor]:
        """The same without gradients, and whether the model finds each token the likeliest one [m]."""
        return token_scores(self._token_logits, *self._predicting(batch, overlay), self._num_words)

    def _predicting(self, batch: Batch, overlay: Overlay) -> tuple[Tensor, Tensor]:
        """The last layer's hidden states [m, H] from which a batch's trained tokens are predicted, and these [m]."""
        assert batch.targets is not None
        hidden = self.hidden(batch, overlay)
        return hidden[batch.targets.texts, batch.targets.columns], batch.targets.tokens

    def _token_logits(self, hidden: Tensor) -> Tensor:
        """Logits [k, V] of hidden states [k, H]."""
        assert self._head is not None
        return self._head(hidden[None])[0].to(self.torch_device)

    @property
    def _num_words(self) -> int:
        return len(self.base.get_input_embeddings().weight)

    @contextmanager
    def watched_embeddings(self, moved: Tensor | float = 0.0) -> Iterator[list[Tensor]]:
        """Add ``moved`` to the word embeddings [b, s, H] in this context; the list of the results, for gradients.

        Batches are padded here.
        """
        seen: list[Tensor] = []

        def replace(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            seen.append((output + moved).detach().requires_grad_())
            return seen[-1]

        hook = self.base.get_input_embeddings().register_forward_hook(replace)
        try:
            with self._padded():
                yield seen
        finally:
            hook.remove()

    @torch.no_grad()
    def layer_outputs(self, batch: Batch) -> list[Tensor]:
        """Each layer's output [b, s, H], without prompts; at padding too, which the papers' scores count."""
        outputs: list[Tensor] = []

        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            outputs.append(output[0] if isinstance(output, tuple) else output)

        hooks = [layer.register_forward_hook(keep) for layer in self._layers]
        try:
            with self._padded():
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
        """The gradients of a loss.

        In float16 a larger loss is differentiated: most of a small gradient would become zero within the backbone.
        """
        differentiate = partial(torch.autograd.grad, create_graph=create_graph, retain_graph=retain_graph)
        if self.base.dtype != torch.float16:
            return list(differentiate(loss, inputs))
        enlarged = differentiate(LOSS_SCALE * loss, inputs)
        return [at_least_float32(gradient) / LOSS_SCALE for gradient in enlarged]

    def _at_slots(self, batch: Batch, overlay: Overlay) -> Tensor:
        """The last layer's hidden states at the answer slots [b, H]."""
        positions = self._positions(batch.input_ids, batch.attention_mask, overlay.first_position)
        first = overlay.tokens.count if overlay.tokens else 0
        narrow = {"slots": batch.slots + first} if self._last_layer and overlay is not NO_OVERLAY else {}
        hidden = self._run(batch.input_ids, self._mask(batch), positions, overlay, batch, **narrow)
        if narrow:
            return hidden.flatten(0, 1)
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
            inputs |= {"prompts": [each.to(self.base.dtype) for each in overlay.prompts], "sizes": batch.sizes}
        rows = self._rows(batch, inputs, overlay) if self._in_rows and batch.is_padded else None
        if rows is not None:
            inputs = _one_behind_the_other(rows, inputs)
            if enter is not None:
                layer, put_first = enter
                enter = layer, lambda hidden: rows.pack(put_first(rows.unpack(hidden)))
        if self.kind == "decoder":
            inputs["use_cache"] = False
        self.hooks.set(overlay.edits, rows.of_devices if rows else partial(of_devices, batch.sizes), enter)
        output = (
            functional_call(self.base, dict(overlay.weights), (), inputs) if overlay.weights else self.base(**inputs)
        )
        hidden: Tensor = output.last_hidden_state.to(self.torch_device)
        if "slots" in extra:
            return hidden
        hidden = hidden if rows is None else rows.unpack(hidden)
        return hidden if tokens is None else hidden[:, tokens.count :]

    def _rows(self, batch: Batch, inputs: dict[str, Any], overlay: Overlay) -> Rows:
        """The batch's texts, soft tokens before and answers behind them, one behind the other."""
        before = overlay.tokens.count if overlay.tokens else 0
        behind = inputs["position_ids"].shape[1] - before - batch.input_ids.shape[1]
        in_text = np.arange(batch.input_ids.shape[1]) < batch.lengths[:, None]
        mask = inputs["attention_mask"]
        later, *masks = inputs.get("later", (0,))
        return Rows(
            np.pad(in_text, ((0, 0), (before, behind)), constant_values=True),
            batch.sizes,
            [mask if mask is not None and mask.dim() == 4 else None, *masks],
            later=later,
            prompt_tokens=0 if overlay.prompts is None else overlay.prompts[0].shape[2],
            width=self.base.config.hidden_size,
            device=self.torch_device,
        )

    @contextmanager
    def _padded(self) -> Iterator[None]:
        """In this context batches are padded."""
        before, self._in_rows = self._in_rows, False
        try:
            yield
        finally:
            self._in_rows = before

    def _with_tokens(
        self, tokens: SoftTokens, inputs: dict[str, Any], batch: Batch
    ) -> tuple[dict[str, Any], tuple[int, Callable[[Tensor], Tensor]] | None]:
        """The inputs with T tokens first; above the embeddings, also the layer they enter at and how."""
        ids, mask, count = inputs.pop("input_ids"), inputs["attention_mask"], tokens.count
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        words, causal = self.base.get_input_embeddings()(ids), self.kind == "decoder"
        num_answer_tokens = ids.shape[1] - batch.input_ids.shape[1]
        in_text = functional.pad(batch.given, (0, num_answer_tokens)).unsqueeze(-1)
        first = ids.new_ones(len(ids), count)
        no_words = torch.full_like(first, -1)
        inputs["position_ids"] = torch.cat([self._positions(no_words, first, 0), inputs["position_ids"]], dim=1)

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
        """Logits [b, s, V] of hidden states [b, s, H], in float32; V: the class words, unless all words are needed."""
        assert self._head is not None
        return at_least_float32(self._head(hidden).to(self.torch_device))

    def _positions(self, ids: Tensor, mask: Tensor, first_position: int) -> Tensor:
        if self.base.config.model_type in POSITIONS_COUNT_TOKENS:
            padding = self.base.config.pad_token_id
            counted = mask * (ids != padding)  # a text may hold the padding token as a word
            return (counted.cumsum(1) + first_position) * counted + padding
        return torch.arange(first_position, first_position + ids.shape[1], device=ids.device).expand_as(ids)


def _one_behind_the_other(rows: Rows, inputs: dict[str, Any]) -> dict[str, Any]:
    """A model's inputs, of one row; a mask of four dimensions, which nobody looks at, keeps it from making one."""
    texts = {name: rows.pack(inputs[name]) for name in inputs.keys() & {"input_ids", "inputs_embeds", "position_ids"}}
    others = {name: value for name, value in inputs.items() if name not in {*texts, "later", "sizes"}}
    no_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=rows.device)
    return {**others, **texts, "attention_mask": no_mask, "rows": rows}


def of_devices(sizes: Sequence[int], count: int) -> list[int]:
    """How many of so many rows belong to each device, where every text has equally many."""
    return [count // sum(sizes) * size for size in sizes]
