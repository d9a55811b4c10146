"""Late prompts: soft tokens that enter at a layer in the middle, made from the text's hidden states there.

Late Prompt Tuning: A Late Prompt Could Be Better Than Many Prompts. Liu, Sun, Huang, Qiu. Findings of EMNLP 2022.
https://arxiv.org/abs/2210.11292, with the naive prompt generator. Below that layer nothing is trained, so no gradient
passes there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fedhpc.config.sections import Positive
from fedhpc.errors import ConfigError
from fedhpc.job.deferred import Tensor
from fedhpc.model.numbers import mean_over_text
from fedhpc.model.overlay import Overlay
from fedhpc.registry import TUNINGS
from fedhpc.tuning.base import Params, Tuning
from fedhpc.tuning.generator import GeneratorConfig, generate, generator_shapes

if TYPE_CHECKING:
    from fedhpc.data.prepared import Batch
    from fedhpc.model.backbone import Backbone
    from fedhpc.model.pretrained import BackboneShape


@TUNINGS.register("late_prompt")
class LatePrompt(Tuning):
    """The generator's weights; see `fedhpc.tuning.generator`."""

    class Config(GeneratorConfig):
        """Keys."""

        layer: Positive | None = None
        """Tokens enter where this layer begins; the middle one unless given."""

    has_layers = False
    masks_know_window = False

    @classmethod
    def check(cls, config: Any) -> None:
        """See `Tuning`."""
        super().check(config)
        if (attention := config.model.attention) != "sdpa":
            raise ConfigError(
                f"model.attention: {attention} takes no tuning.kind: {config.tuning.kind}; use model.attention: sdpa"
            )

    def __init__(self, config: Any, shape: BackboneShape, *, num_classes: int) -> None:
        super().__init__(config, shape, num_classes=num_classes)
        generator = generator_shapes(config, inputs=shape.hidden_size, outputs=shape.hidden_size)
        self.shared = {**generator, **self.shared}
        self.layer = shape.num_layers // 2 if config.layer is None else config.layer
        if not 0 < self.layer < shape.num_layers:
            valid = f"valid: 1 to {shape.num_layers - 1}"
            raise ConfigError(f"tuning.layer: {self.layer} is not in the middle of {shape.num_layers} layers; {valid}")

    def overlay(
        self,
        backbone: Backbone,
        params: Sequence[Params],
        batch: Batch,
        dropout_seeds: Sequence[int] | None,
    ) -> Overlay:
        """See `Tuning`."""

        def make(hidden: Tensor, in_text: Tensor) -> Tensor:
            return generate(params, mean_over_text(hidden, in_text), batch.sizes, self.config.num_tokens)

        return self.soft_tokens(make, self.layer)
