"""Deep prompts: T trainable key and value vectors before those of the sequence, in every layer.

P-Tuning v2: Prompt Tuning Can Be Comparable to Fine-tuning Universally Across Scales and Tasks. Liu, Ji, Fu, Tam, Du,
Yang, Tang. ACL 2022. https://arxiv.org/abs/2110.07602.
"""

from collections.abc import Sequence

import torch

from fedhpc.config import TuningConfig
from fedhpc.data.prepared import Batch
from fedhpc.model.backbone import Backbone
from fedhpc.model.overlay import Overlay
from fedhpc.model.pretrained import BackboneShape
from fedhpc.tuning.base import Params, Tuning, dropout


class DeepPrompts(Tuning):
    """`prompts` [L, 2, T, D]; axis 1: 0 = key, 1 = value."""

    def __init__(self, config: TuningConfig, shape: BackboneShape, *, num_classes: int) -> None:
        super().__init__(config, shape, num_classes=num_classes)
        self.per_layer = {"prompts": (shape.num_layers, 2, config.num_tokens, shape.key_width)}

    def overlay(
        self,
        backbone: Backbone,
        params: Sequence[Params],
        batch: Batch,
        dropout_seeds: Sequence[int] | None,
    ) -> Overlay:
        """See :class:`Tuning`."""
        each = [device["prompts"] for device in params]
        if self.config.dropout and dropout_seeds is not None:
            each = [dropout(p, self.config.dropout, seed) for p, seed in zip(each, dropout_seeds, strict=True)]
        first_position = self.config.num_tokens if self.config.position_offset else 0
        return Overlay(prompts=torch.stack(each), first_position=first_position)
