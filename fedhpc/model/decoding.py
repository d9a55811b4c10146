"""Answers: transformers' own `generate` on the frozen model, with an overlay at every step.

Shapes: b prompts, s tokens of the longest, T soft tokens or prompt tokens, H hidden size, V words.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from fedhpc.data.prepared import Batch
from fedhpc.model.backbone import Backbone
from fedhpc.model.forward import of_devices
from fedhpc.model.overlay import Overlay
from fedhpc.seeding import generator


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How prompts are answered."""

    max_new_tokens: int
    temperature: float
    """0: the likeliest token each time."""
    top_p: float
    """Tokens are drawn from the likeliest ones that have this probability together."""
    ends: tuple[int, ...]
    """Tokens that end an answer."""
    pad_id: int
    seed: int


def decode(
    backbone: Backbone,
    overlay: Overlay,
    batch: Batch,
    how: Decoding,
    examples: Sequence[int],
    *,
    beat: Callable[[], None] = lambda: None,
    streamer: Any = None,
) -> list[list[int]]:
    """The answer to each prompt of a batch, without the token that ends it.

    What is drawn is a function of the seed and the example's number alone.

    Args:
        overlay: of the batch's devices.
        batch: prompts; what is padding is never seen.
        examples: number of each prompt.
        beat: called at every token; it may raise.
        streamer: is given the tokens of a single prompt as they come.
    """
    overlaid = _Overlaid(backbone, overlay, batch)
    draws = [generator(how.seed, purpose=f"answer {example}") for example in examples] if how.temperature else []
    config = GenerationConfig(
        max_new_tokens=how.max_new_tokens, do_sample=False, eos_token_id=list(how.ends) or None, pad_token_id=how.pad_id
    )
    with overlaid.laid():
        call = partial(
            backbone.model.generate,
            **overlaid.inputs,
            generation_config=config,
            logits_processor=LogitsProcessorList([Choice(how, draws, beat)]),
            streamer=streamer,
        )
        if overlay.weights:
            weights = {f"base.{path}": tensor for path, tensor in overlay.weights.items()}
            found = functional_call(_With(backbone.base, call), weights, ())
        else:
            found = call()
    first = overlaid.inputs["input_ids"].shape[1] if "input_ids" in overlaid.inputs else 0
    return [_until(own, how.ends) for own in found[:, first:].tolist()]


def _until(tokens: list[int], ends: Sequence[int]) -> list[int]:
    return tokens[: next((place for place, token in enumerate(tokens) if token in ends), len(tokens))]


class _Overlaid:
    """What `generate` is given, and what every pass of it carries beside that.

    Prompts are padded on the left, so that all answers begin in one column; soft tokens stand between padding and text,
    where a sliding window finds them. The cache holds the texts' and the soft tokens' keys and values. Those of deep
    prompts are put before them anew at every step: a cache would count them into the window.
    """

    def __init__(self, backbone: Backbone, overlay: Overlay, batch: Batch) -> None:
        self._backbone, self._overlay, self._batch = backbone, overlay, batch
        self._step = 0
        tokens = overlay.tokens
        count = 0 if tokens is None else tokens.count
        size = count + batch.input_ids.shape[1]
        columns = torch.arange(size, device=batch.input_ids.device)
        lengths = torch.from_numpy(batch.lengths).to(columns.device)[:, None] + count
        self._from_right = (columns + lengths) % size
        """Of each column [b, T + s] of what is padded on the left, that of the same padded on the right."""
        self._mask = columns >= size - lengths
        self._is_token = self._mask & (columns < size - lengths + count)
        if tokens is None:
            self.inputs = {"input_ids": batch.input_ids.gather(1, self._from_right)}
        else:
            words = backbone.base.get_input_embeddings()(batch.input_ids)
            whole = self._with_tokens(words) if tokens.layer == 0 else functional.pad(words, (0, 0, count, 0))
            self.inputs = {"inputs_embeds": self._on_the_left(whole)}
        self.inputs["attention_mask"] = self._mask.long()

    def _with_tokens(self, text: Tensor) -> Tensor:
        """[b, T + s, H] with soft tokens before the texts' hidden states [b, s, H], both padded on the right."""
        assert self._overlay.tokens is not None
        return torch.cat([self._overlay.tokens.make(text, self._batch.given.unsqueeze(-1)).to(text), text], dim=1)

    def _on_the_left(self, padded: Tensor) -> Tensor:
        """[b, T + s, H] padded on the left."""
        return padded.take_along_dim(self._from_right.unsqueeze(-1), dim=1)

    def _enter(self, hidden: Tensor) -> Tensor:
        """Hidden states [b, T + s, H], padded on the left, with late tokens in the places that were kept for them."""
        assert self._overlay.tokens is not None
        on_the_right = torch.empty_like(hidden).scatter(1, self._from_right.unsqueeze(-1).expand_as(hidden), hidden)
        return self._on_the_left(self._with_tokens(on_the_right[:, self._overlay.tokens.count :]))

    @contextmanager
    def laid(self) -> Iterator[None]:
        """In this context every pass of the model carries the overlay."""
        hook = self._backbone.model.base_model.get_decoder().register_forward_pre_hook(self._before, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    def _before(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        overlay, sizes = self._overlay, self._batch.sizes
        enter, tokens = None, overlay.tokens
        if overlay.prompts is not None:
            dtype = self._backbone.base.dtype
            kwargs |= {"prompts": [each.to(dtype) for each in overlay.prompts], "sizes": sizes}
        if overlay.first_position and tokens is None:
            kwargs["position_ids"] = kwargs["position_ids"] + overlay.first_position
        if tokens is not None and tokens.layer > 0:
            seen, unseen = (self._mask_of_tokens(visible=visible) for visible in (True, False))
            kwargs |= {"attention_mask": unseen, "later": (tokens.layer, seen)}
            enter = (tokens.layer, self._enter) if self._step == 0 else None
        self._backbone.hooks.set(overlay.edits, partial(of_devices, sizes), enter)
        self._step += 1
        return args, kwargs

    def _mask_of_tokens(self, *, visible: bool) -> Tensor:
        """Of late tokens, what this step's positions see [b, 1, q, T + k]: the text sees them if they are visible.

        Padding sees itself, not nothing.
        """
        in_text = functional.pad(self._mask, (0, self._step), value=True)
        is_token = functional.pad(self._is_token, (0, self._step), value=False)
        columns = torch.arange(in_text.shape[1], device=in_text.device)
        rows = columns if self._step == 0 else columns[-1:]
        sees = in_text[:, None, :] & (columns <= rows[:, None])
        if not visible:
            sees = sees & (is_token[:, rows, None] | ~is_token[:, None, :])
        return (sees | (columns == rows[:, None]))[:, None]


class _With(nn.Module):
    """A call, within which a module has other parameters."""

    def __init__(self, base: nn.Module, call: Callable[[], Tensor]) -> None:
        super().__init__()
        self.base, self.call = base, call

    def forward(self) -> Tensor:
        """The call's result."""
        return self.call()


class Choice(LogitsProcessor):
    """Has `generate`, which takes the likeliest token, take one that is drawn; without draws, the likeliest.

    A token is where its number between 0 and 1 falls, with the probabilities side by side, the largest first.
    """

    def __init__(self, how: Decoding, draws: Sequence[np.random.Generator], beat: Callable[[], None]) -> None:
        self._how, self._draws, self._beat = how, draws, beat

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [b, V] of which the chosen token has the largest."""
        self._beat()
        if not self._draws:
            return scores
        # A tiny temperature would make infinities of the scores themselves.
        below = scores.double() - scores.amax(-1, keepdim=True)
        probabilities, tokens = (below / self._how.temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
        sums = probabilities.cumsum(-1)
        kept = probabilities.where(sums - probabilities < self._how.top_p, 0)
        numbers = torch.tensor([[rng.random()] for rng in self._draws], dtype=torch.float64, device=scores.device)
        sums = kept.cumsum(-1)
        places = torch.searchsorted(sums, numbers * sums[:, -1:], right=True)
        chosen = tokens.gather(1, places.clamp(max=(kept > 0).sum(-1, keepdim=True) - 1))
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)
