"""Deep prompts: T trainable key and value vectors before those of the sequence, in every layer.

P-Tuning v2: Prompt Tuning Can Be Comparable to Fine-tuning Universally Across Scales and Tasks. Liu, Ji, Fu, Tam, Du,
Yang, Tang. ACL 2022. https://arxiv.org/abs/2110.07602.
"""

from collections.abc import Mapping

from torch import Tensor
from torch.nn import functional

from fedhpc.config import TuningConfig
from fedhpc.data import Batch
from fedhpc.models import Backbone, BackboneShape
from fedhpc.tuning.base import Tuning, linear_head


class DeepPrompts(Tuning):
    """`prompts` [L, 2, T, D]; axis 1: 0 = key, 1 = value."""

    def __init__(self, config: TuningConfig, shape: BackboneShape, *, num_classes: int) -> None:
        super().__init__(config, shape, num_classes=num_classes)
        self.per_layer = {"prompts": (shape.num_layers, 2, config.num_tokens, shape.key_width)}

    def forward(self, backbone: Backbone, params: Mapping[str, Tensor], batch: Batch, *, training: bool) -> Tensor:
        """Class scores [b, C] of a batch."""
        prompts = functional.dropout(params["prompts"], self.config.dropout, training=training)
        first_position = self.config.num_tokens if self.config.position_offset else 0
        if self.config.head == "linear":
            return linear_head(params, backbone.pooled(batch, prompts, first_position=first_position))
        return backbone.word_scores(batch, prompts, first_position=first_position)
