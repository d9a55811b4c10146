"""Prompt tuning: T trainable vectors before the word embeddings of the text; nothing in the layers.

The Power of Scale for Parameter-Efficient Prompt Tuning. Lester, Al-Rfou, Constant. EMNLP 2021.
https://arxiv.org/abs/2104.08691. With `server.method: fedavg` this is FedPrompt: Zhao, Du, Li, Li, Liu. FedPrompt:
Communication-Efficient and Privacy-Preserving Prompt Tuning in Federated Learning. ICASSP 2023.
https://arxiv.org/abs/2208.12268.
"""

from collections.abc import Sequence

from torch import Tensor

from fedhpc.config import TuningConfig
from fedhpc.data.prepared import Batch
from fedhpc.model.backbone import Backbone
from fedhpc.model.overlay import Overlay
from fedhpc.model.pretrained import BackboneShape
from fedhpc.tuning.base import Params, Tuning, rows_of_devices


class PromptTuning(Tuning):
    """`tokens` [T, E]; E: width of the word embeddings."""

    def __init__(self, config: TuningConfig, shape: BackboneShape, *, num_classes: int) -> None:
        super().__init__(config, shape, num_classes=num_classes)
        self.shared = {"tokens": (config.num_tokens, shape.embedding_width), **self.shared}

    def overlay(
        self,
        backbone: Backbone,
        params: Sequence[Params],
        batch: Batch,
        dropout_seeds: Sequence[int] | None,
    ) -> Overlay:
        """See :class:`Tuning`."""

        def make(words: Tensor, in_text: Tensor) -> Tensor:
            return rows_of_devices([device["tokens"] for device in params], batch.sizes)

        return self.soft_tokens(make)
