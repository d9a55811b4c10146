"""Instance prompts: soft tokens before the word embeddings, made from what the backbone makes of the text alone.

IDPG: An Instance-Dependent Prompt Generation Method. Wu, Wang, Gu, Hou, Dong, Vydiswaran, Ma. NAACL 2022.
https://arxiv.org/abs/2204.04497, the variant S-IDPG-DNN: tokens at the input, a generator of two dense layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fedhpc.job.deferred import Tensor, torch
from fedhpc.model.overlay import Overlay
from fedhpc.registry import TUNINGS
from fedhpc.tuning.base import Params, Tuning
from fedhpc.tuning.generator import GeneratorConfig, generate, generator_shapes

if TYPE_CHECKING:
    from fedhpc.data.prepared import Batch
    from fedhpc.model.backbone import Backbone
    from fedhpc.model.pretrained import BackboneShape


@TUNINGS.register("instance_prompt")
class InstancePrompt(Tuning):
    """The generator's weights; see `fedhpc.tuning.generator`."""

    Config = GeneratorConfig
    has_layers = False

    def __init__(self, config: Any, shape: BackboneShape, *, num_classes: int) -> None:
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
        """See `Tuning`; the text passes through the frozen backbone once more, without gradients."""
        with torch.no_grad():
            representation = backbone.pooled(batch)

        def make(words: Tensor, in_text: Tensor) -> Tensor:
            return generate(params, representation, batch.sizes, self.config.num_tokens)

        return self.soft_tokens(make)
