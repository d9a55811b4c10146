"""ATTEMPT: prompt tuning with a mixture of frozen source prompts, weighted by attention for each text.

ATTEMPT: Parameter-Efficient Multi-task Tuning via Attentional Mixtures of Soft Prompts. Asai, Salehi, Peters,
Hajishirzi. EMNLP 2022. https://arxiv.org/abs/2205.11961, section 3.2; the attention's layer norm has no parameters.

Shapes: b examples, T tokens, H hidden size, m bottleneck, K source prompts.
"""

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from fedhpc.config import TuningConfig
from fedhpc.data import Batch
from fedhpc.errors import ConfigError
from fedhpc.models import Backbone
from fedhpc.overlay import Overlay, each_device
from fedhpc.pretrained import BackboneShape
from fedhpc.tuning.base import Params, Tuning

ADAPTER_FILE = "adapter_model.safetensors"


class Attempt(Tuning):
    """`tokens` [T, H], the task's own prompt; `attention.down` [m, H] and `attention.up` [H, m]."""

    def __init__(self, config: TuningConfig, shape: BackboneShape, *, num_classes: int) -> None:
        super().__init__(config, shape, num_classes=num_classes)
        prompt, width, m = (config.num_tokens, shape.hidden_size), shape.hidden_size, config.bottleneck
        own = {"tokens": prompt, "attention.down": (m, width), "attention.up": (width, m)}
        self.shared = {**own, **self.shared}
        self.sources = torch.stack([_read_prompt(Path(folder), prompt) for folder in config.sources])
        self.files = {"tuning.sources sha256": hashlib.sha256(self.sources.numpy().tobytes()).hexdigest()}

    def overlay(
        self,
        backbone: Backbone,
        params: Sequence[Params],
        batch: Batch,
        dropout_seeds: Sequence[int] | None,
    ) -> Overlay:
        """See :class:`Tuning`."""

        def make(words: Tensor, in_text: Tensor) -> Tensor:
            text = words.to(params[0]["tokens"]).masked_fill(~in_text.bool(), -math.inf).amax(1)  # [b, H]
            return each_device(lambda place, x: self._mixture(params[place], x), text, batch.sizes)

        return self.soft_tokens(make)

    def _mixture(self, own: Params, text: Tensor) -> Tensor:
        """P_instance [b, T, H] = P_target + sum_j a_j P_j, from the texts' embeddings, their largest values [b, H]."""
        target, width = own["tokens"], text.shape[-1]
        prompts = torch.cat([self.sources.to(target), target[None]])  # [K + 1, T, H]
        query = functional.linear(functional.silu(functional.linear(text, own["attention.down"])), own["attention.up"])
        query = functional.layer_norm(query, (width,))
        weights = torch.softmax(query @ prompts.amax(1).T / (width * math.e), dim=-1)  # [b, K + 1]
        return target + torch.einsum("bk,kth->bth", weights, prompts)


def _read_prompt(folder: Path, shape: tuple[int, int]) -> Tensor:
    """The prompt [T, H] of a PEFT prompt-tuning adapter."""
    path = folder / ADAPTER_FILE
    try:
        prompt = load_file(path).get("prompt_embeddings")
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"tuning.sources: {path} cannot be read: {error}; a source is the folder that fedhpc export wrote for a "
            "run with tuning.kind: prompt_tuning"
        ) from None
    if prompt is None or tuple(prompt.shape) != shape:
        found = "no prompt_embeddings" if prompt is None else f"a prompt of {tuple(prompt.shape)}"
        raise ConfigError(f"tuning.sources: {path} has {found}; {shape} is needed (tuning.num_tokens, hidden size)")
    return prompt.float()
