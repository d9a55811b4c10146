"""How much each layer's output moves when its text is moved along the loss gradient.

FibecFed, https://arxiv.org/abs/2410.00131: layers that an adversarial perturbation of the input embeddings moves most
are exchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from fedhpc.job.deferred import Tensor, torch
from fedhpc.registry import STRATEGIES
from fedhpc.selection.strategies.score import ScoredConfig
from fedhpc.selection.strategy import Strategy
from fedhpc.tuning.base import as_parameters

if TYPE_CHECKING:
    from fedhpc.data.prepared import Batch
    from fedhpc.model.backbone import Backbone
    from fedhpc.tuning import Tuning

PERTURBATION = 0.01
"""Its Frobenius norm, as a share of that of the batch's embeddings."""


@STRATEGIES.register("sensitivity")
class Sensitivity(Strategy):
    """The layers that react most to a perturbation of the text."""

    Config = ScoredConfig
    scored = True
    with_gradients = True

    def score_layers(
        self, backbone: Backbone, tuning: Tuning, tensors: Mapping[str, np.ndarray], batch: Batch
    ) -> np.ndarray:
        """See `Strategy`."""
        return layer_sensitivity(backbone, tuning, tensors, batch)


def layer_sensitivity(
    backbone: Backbone, tuning: Tuning, tensors: Mapping[str, np.ndarray], batch: Batch
) -> np.ndarray:
    """Of each layer |moved output - output| / |output|, Frobenius norms over the texts of one batch; [L].

    Padding counts nowhere: what a layer puts out there belongs to no text.

    Args:
        tensors: all trainable tensors, which the loss gradient is taken with.

    Raises:
        FloatingPointError: the loss gradient is zero, or not finite.
    """
    params = as_parameters(tensors, backbone.torch_device)
    with backbone.watched_embeddings() as embeddings:
        loss = tuning.loss_terms(backbone, [params], batch).mean()
        (gradient,) = backbone.gradients(loss, embeddings[-1:])
    num_positions = batch.input_ids.shape[1]  # without those of answers
    gradient, text = (of_text(part[:, :num_positions], batch) for part in (gradient, embeddings[-1].detach()))
    scale = PERTURBATION * text.norm() / gradient.norm()
    if not torch.isfinite(scale):
        raise FloatingPointError(
            "selection.strategy: sensitivity cannot rank the layers: a batch's loss gradient is zero or not finite; "
            "try another model.dtype"
        )
    before = backbone.layer_outputs(batch)
    with backbone.watched_embeddings(moved=(scale * gradient).to(embeddings[-1])):
        after = backbone.layer_outputs(batch)
    pairs = ((of_text(a.float(), batch), of_text(b.float(), batch)) for a, b in zip(before, after, strict=True))
    return np.array([float((b - a).norm() / a.norm()) for a, b in pairs])


def of_text(states: Tensor, batch: Batch) -> Tensor:
    """States [b, s, H] with zeros at padding."""
    return states.masked_fill(~batch.attention_mask.to(states.device, torch.bool).unsqueeze(-1), 0)
