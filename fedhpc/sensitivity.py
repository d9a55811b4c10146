"""How much each layer's output moves when its text is moved along the loss gradient.

FibecFed, https://arxiv.org/abs/2410.00131: layers that an adversarial perturbation of the input embeddings moves most
are exchanged.
"""

import numpy as np
import torch

from fedhpc.data import Batch
from fedhpc.models import Backbone
from fedhpc.tuning import Tuning
from fedhpc.tuning.base import as_parameters

PERTURBATION = 0.01
"""Its Frobenius norm, as a share of that of the batch's embeddings."""


def layer_sensitivity(backbone: Backbone, tuning: Tuning, tensors: dict[str, np.ndarray], batch: Batch) -> np.ndarray:
    """Of each layer |moved output - output| / |output|, Frobenius norms over one batch; [L].

    Args:
        tensors: all trainable tensors, which the loss gradient is taken with.

    Raises:
        FloatingPointError: the loss gradient is zero, or not finite.
    """
    params = as_parameters(tensors, backbone.torch_device)
    with backbone.watched_embeddings() as embeddings:
        loss = tuning.losses(tuning.forward(backbone, [params], batch), batch.labels).mean()
        (gradient,) = backbone.gradients(loss, embeddings[-1:])
    gradient, text = (part[:, : batch.input_ids.shape[1]] for part in (gradient, embeddings[-1].detach()))  # no answers
    scale = PERTURBATION * text.norm() / gradient.norm()
    if not torch.isfinite(scale):
        raise FloatingPointError(
            "selection.strategy: sensitivity cannot rank the layers: a batch's loss gradient is zero or not finite; "
            "try another model.dtype"
        )
    before = backbone.layer_outputs(batch)
    with backbone.watched_embeddings(moved=(scale * gradient).to(embeddings[-1])):
        after = backbone.layer_outputs(batch)
    moves = [float((b - a).float().norm() / a.float().norm()) for a, b in zip(before, after, strict=True)]
    return np.array(moves)
