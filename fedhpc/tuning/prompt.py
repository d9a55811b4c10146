"""Deep prompts: T trainable key and value vectors before those of the sequence, in every layer.

P-Tuning v2: Prompt Tuning Can Be Comparable to Fine-tuning Universally Across Scales and Tasks. Liu, Ji, Fu, Tam, Du,
Yang, Tang. ACL 2022. https://arxiv.org/abs/2110.07602.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fedhpc.config.sections import Probability
from fedhpc.errors import ModelError
from fedhpc.job.deferred import torch
from fedhpc.model.overlay import Overlay
from fedhpc.registry import TUNINGS
from fedhpc.tuning.base import Params, TokensConfig, Tuning, dropout
from fedhpc.tuning.peft_form import PeftForm

if TYPE_CHECKING:
    from fedhpc.data.prepared import Batch
    from fedhpc.model.backbone import Backbone
    from fedhpc.model.pretrained import BackboneShape


@TUNINGS.register("prompt")
class DeepPrompts(Tuning):
    """`prompts` [L, 2, T, D]; axis 1: 0 = key, 1 = value."""

    class Config(TokensConfig):
        """Keys."""

        position_offset: bool = True
        """Sequence positions start after T prompt positions, as in P-tuning v2 and the released code."""
        dropout: Probability = 0.0
        """Dropout on the prompts during training."""

        @property
        def tokens_before_text(self) -> int:
            """See `fedhpc.config.sections.TuningConfig`."""
            return self.num_tokens if self.position_offset else 0

        @property
        def draws(self) -> bool:
            """See `fedhpc.config.sections.TuningConfig`."""
            return self.dropout > 0

        @property
        def fewer_positions(self) -> list[str]:
            """See `fedhpc.config.sections.TuningConfig`."""
            return ["set tuning.position_offset: false"]

    prompts_in_layers = True
    peft_type = "PREFIX_TUNING"

    def __init__(self, config: Any, shape: BackboneShape, *, num_classes: int) -> None:
        super().__init__(config, shape, num_classes=num_classes)
        self.per_layer = {"prompts": (shape.num_layers, 2, config.num_tokens, shape.key_width)}

    def overlay(
        self,
        backbone: Backbone,
        params: Sequence[Params],
        batch: Batch,
        dropout_seeds: Sequence[int] | None,
    ) -> Overlay:
        """See `Tuning`."""
        each = [device["prompts"] for device in params]
        if self.config.dropout and dropout_seeds is not None:
            each = [dropout(p, self.config.dropout, seed) for p, seed in zip(each, dropout_seeds, strict=True)]
        first_position = self.config.num_tokens if self.config.position_offset else 0
        layers = zip(*map(self.rows, each), strict=True)
        return Overlay(prompts=[torch.stack(devices) for devices in layers], first_position=first_position)

    def to_peft(self, tensors: Mapping[str, np.ndarray], model: Any, *, longest: int) -> PeftForm:
        """Prefix tuning: `prompt_embeddings` [T, L * 2 * D] from `prompts` [L, 2, T, D]."""
        from fedhpc.model.pretrained import POSITIONS_COUNT_TOKENS

        prompts = tensors["prompts"]
        num_layers, _, num_tokens, width = prompts.shape
        self._check_prefix(model, longest + num_tokens)
        first_position = None
        if not self.config.position_offset:
            # PEFT adds T to positions that it is given.
            counts = model.config.model_type in POSITIONS_COUNT_TOKENS
            first_position = (model.config.pad_token_id + 1 if counts else 0) - num_tokens
        return PeftForm(
            config={
                "peft_type": self.peft_type,
                "num_layers": num_layers,
                "num_virtual_tokens": num_tokens,
                "token_dim": width,
                "num_attention_heads": self.shape.num_key_value_heads,
                "num_transformer_submodules": 1,
                "prefix_projection": False,
            },
            tensors={"prompt_embeddings": prompts.transpose(2, 0, 1, 3).reshape(num_tokens, -1)},
            first_position=first_position,
        )

    def _check_prefix(self, model: Any, longest: int) -> None:
        who, window = f"model.name: {self.shape.name}: PEFT's prefix tuning", self.shape.sliding_window
        if "past_key_values" not in inspect.signature(model.base_model.forward).parameters:
            raise ModelError(
                f"{who} hands prompts over as past_key_values, which a {model.config.model_type} model does not take"
            )
        if window is not None and longest > window:
            raise ModelError(
                f"{who} counts prompts into the window of {window} positions, but texts and prompts have up to "
                f"{longest}; prepare the data with a smaller --max-length"
            )
