"""Instance prompts: soft tokens before the word embeddings, made from what the backbone makes of the text alone.

IDPG: An Instance-Dependent Prompt Generation Method. Wu, Wang, Gu, Hou, Dong, Vydiswaran, Ma. NAACL 2022.
https://arxiv.org/abs/2204.04497, the variant S-IDPG-DNN: tokens at the input, a generator of two dense layers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedhpc.config import TuningConfig
from fedhpc.data.prepared import Batch
from fedhpc.model.backbone import Backbone
from fedhpc.model.overlay import Overlay
from fedhpc.model.pretrained import BackboneShape
from fedhpc.tuning.base import Params, Tuning
from fedhpc.tuning.generator import generate, generator_shapes


class InstancePrompt(Tuning):
    """The generator's weights; see :mod:`fedhpc.tuning.generator`."""

    def __init__(self, config: TuningConfig, shape: BackboneShape, *, num_classes: int) -> None:
        super().__init__(config, shape, num_classes=num_classes)
        generator = generator_shapes(config, inputs=shape.output_width, outputs=shape.embedding_width)
        self.shared = {**generator, **self.shared}

    def overlay(
        self,
        backbone: Backbone,
        params: Sequence[Params],
        batch: Batch,
        dropout_seeds: Sequence[int] | None,
    ) -> Overlay:
        """See :class:`Tuning`; the text passes through the frozen backbone once more, without gradients."""
        with torch.no_grad():
            representation = backbone.pooled(batch)

        def make(words: Tensor, in_text: Tensor) -> Tensor:
            return generate(params, representation, batch.sizes, self.config.num_tokens)

        return self.soft_tokens(make)
