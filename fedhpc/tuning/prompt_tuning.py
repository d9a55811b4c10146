"""Prompt tuning: T trainable vectors before the word embeddings of the text; nothing in the layers.

The Power of Scale for Parameter-Efficient Prompt Tuning. Lester, Al-Rfou, Constant. EMNLP 2021.
https://arxiv.org/abs/2104.08691. With `server.method: fedavg` this is FedPrompt: Zhao, Du, Li, Li, Liu. FedPrompt:
Communication-Efficient and Privacy-Preserving Prompt Tuning in Federated Learning. ICASSP 2023.
https://arxiv.org/abs/2208.12268.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fedhpc.job.deferred import Tensor
from fedhpc.model.overlay import Overlay, rows_of_devices
from fedhpc.registry import TUNINGS
from fedhpc.tuning.base import Params, TokensConfig, Tuning
from fedhpc.tuning.peft_form import PeftForm

if TYPE_CHECKING:
    from fedhpc.data.prepared import Batch
    from fedhpc.model.backbone import Backbone
    from fedhpc.model.pretrained import BackboneShape


@TUNINGS.register("prompt_tuning")
class PromptTuning(Tuning):
    """`tokens` [T, E]; E: width of the word embeddings."""

    Config = TokensConfig
    has_layers = False
    is_prompt_before_text = True
    peft_type = "PROMPT_TUNING"

    def __init__(self, config: Any, shape: BackboneShape, *, num_classes: int) -> None:
        super().__init__(config, shape, num_classes=num_classes)
        self.shared = {"tokens": (config.num_tokens, shape.embedding_width), **self.shared}

    def overlay(
        self,
        backbone: Backbone,
        params: Sequence[Params],
        batch: Batch,
        dropout_seeds: Sequence[int] | None,
    ) -> Overlay:
        """See `Tuning`."""

        def make(words: Tensor, in_text: Tensor) -> Tensor:
            return rows_of_devices([device["tokens"] for device in params], batch.sizes)

        return self.soft_tokens(make)

    def to_peft(self, tensors: Mapping[str, np.ndarray], model: Any, *, longest: int) -> PeftForm:
        """Prompt tuning: `prompt_embeddings` [T, E], the tuning's `tokens`."""
        num_tokens, width = tensors["tokens"].shape
        return PeftForm(
            config={
                "peft_type": self.peft_type,
                "num_virtual_tokens": num_tokens,
                "token_dim": width,
                "num_layers": self.shape.num_layers,
                "num_attention_heads": self.shape.num_heads,
                "num_transformer_submodules": 1,
            },
            tensors={"prompt_embeddings": tensors["tokens"]},
            output_offset=num_tokens,
        )
