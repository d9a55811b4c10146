"""From hidden states to logits as a model's own forward pass goes: its head, and what scales or caps the logits.

Shapes: b examples, s positions, H hidden size, V words of the head.
"""

from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput


class Given(BaseModelOutput):
    """What the layers put out, of which the last hidden states alone are known."""

    def __getattr__(self, name: str) -> None:
        return None


class WordHead:
    """A language model without its layers: they hand on what they are given."""

    def __init__(self, model: Any) -> None:
        self._model = model
        # Some models call what is within their base model, as OPT its decoder.
        self._layers: nn.Module = model.base_model.get_decoder()

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits [b, s, V] of the last layer's hidden states [b, s, H]."""
        own = self._layers.__dict__.get("forward")
        self._layers.forward = _hand_on
        try:
            logits: Tensor = self._model(inputs_embeds=hidden).logits
        finally:
            del self._layers.forward
            if own is not None:
                self._layers.forward = own
        return logits

    def keep(self, words: list[int]) -> None:
        """Cut the output down to these words' rows: no other logit is ever computed."""
        output = self._model.get_output_embeddings()
        # New parameters, not a new module: embeddings may share the weight, and others hold a reference to the module.
        output.weight = nn.Parameter(output.weight[words], requires_grad=False)
        if output.bias is not None:
            output.bias = nn.Parameter(output.bias[words], requires_grad=False)
        output.out_features = len(words)


def _hand_on(*_args: Any, inputs_embeds: Tensor, **_kwargs: Any) -> Given:
    return Given(last_hidden_state=inputs_embeds)
