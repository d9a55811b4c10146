"""ATTEMPT: prompt tuning with a mixture of frozen source prompts, weighted by attention for each text.

ATTEMPT: Parameter-Efficient Multi-task Tuning via Attentional Mixtures of Soft Prompts. Asai, Salehi, Peters,
Hajishirzi. EMNLP 2022. https://arxiv.org/abs/2205.11961, section 3.2; the attention's layer norm has no parameters.

Shapes: b examples, T tokens, E width of the word embeddings, m bottleneck, K source prompts.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedhpc.config.sections import PathName, Positive
from fedhpc.errors import ConfigError
from fedhpc.job.deferred import Tensor, functional, torch
from fedhpc.model.overlay import Overlay, each_device
from fedhpc.registry import TUNINGS
from fedhpc.tuning.base import Params, TokensConfig, Tuning

if TYPE_CHECKING:
    from fedhpc.data.prepared import Batch
    from fedhpc.model.backbone import Backbone
    from fedhpc.model.pretrained import BackboneShape

CONFIG_FILE, ADAPTER_FILE, PROMPT = "adapter_config.json", "adapter_model.safetensors", "prompt_embeddings"
BACKBONE_SHA256 = "backbone_sha256"
"""In an exported adapter file's metadata, of which PEFT takes no notice: `weights_sha256` of what it was tuned on."""


@TUNINGS.register("attempt")
class Attempt(Tuning):
    """`tokens` [T, E], the task's own prompt; `attention.down` [m, E] and `attention.up` [E, m]."""

    class Config(TokensConfig):
        """Keys."""

        bottleneck: Positive = 32
        """Width of the small network."""
        sources: list[PathName] = []  # noqa: RUF012 - Pydantic copies it
        """Folders with the prompts of other tasks, as `fedhpc export` writes them for runs with `prompt_tuning` of the
        same model."""

        @property
        def folders(self) -> list[str]:
            """See `fedhpc.config.sections.TuningConfig`."""
            return self.sources

    has_layers = False

    @classmethod
    def check(cls, config: Any) -> None:
        """See `Tuning`."""
        super().check(config)
        if not config.tuning.sources:
            raise ConfigError("tuning.kind: attempt needs tuning.sources, folders with the prompts of other tasks")

    def __init__(self, config: Any, shape: BackboneShape, *, num_classes: int) -> None:
        from fedhpc.model.pretrained import load_pretrained
        from fedhpc.model.weight_files import weights_sha256

        super().__init__(config, shape, num_classes=num_classes)
        width, m = shape.embedding_width, config.bottleneck
        prompt = (config.num_tokens, width)
        own = {"tokens": prompt, "attention.down": (m, width), "attention.up": (width, m)}
        self.shared = {**own, **self.shared}
        sha256 = load_pretrained(weights_sha256, shape.name)
        self.sources = torch.stack(
            [_read_prompt(Path(folder), prompt, shape.name, sha256) for folder in config.sources]
        )
        self.files = {"tuning.sources sha256": hashlib.sha256(self.sources.numpy().tobytes()).hexdigest()}

    def overlay(
        self,
        backbone: Backbone,
        params: Sequence[Params],
        batch: Batch,
        dropout_seeds: Sequence[int] | None,
    ) -> Overlay:
        """See `Tuning`."""

        def make(words: Tensor, in_text: Tensor) -> Tensor:
            text = words.to(params[0]["tokens"]).masked_fill(~in_text.bool(), -math.inf).amax(1)  # [b, E]
            return each_device(lambda place, x: self._mixture(params[place], x), text, batch.sizes)

        return self.soft_tokens(make)

    def _mixture(self, own: Params, text: Tensor) -> Tensor:
        """P_instance [b, T, E] = P_target + sum_j a_j P_j, from the texts' embeddings, their largest values [b, E]."""
        target, width = own["tokens"], text.shape[-1]
        prompts = torch.cat([self.sources.to(target), target[None]])  # [K + 1, T, E]
        query = functional.linear(functional.silu(functional.linear(text, own["attention.down"])), own["attention.up"])
        query = functional.layer_norm(query, (width,))
        weights = torch.softmax(query @ prompts.amax(1).T / (width * math.e), dim=-1)  # [b, K + 1]
        return target + torch.einsum("bk,kth->bth", weights, prompts)


def _read_prompt(folder: Path, shape: tuple[int, int], backbone: str, sha256: str) -> Tensor:
    """The prompt [T, E] of a PEFT prompt-tuning adapter for a backbone, whose weights have this sum."""
    from safetensors import SafetensorError, safe_open

    path = folder / ADAPTER_FILE
    try:
        if path.exists() and not path.is_file():
            raise OSError("it is no plain file")
        path.open("rb").close()  # of a file that is closed to us, safetensors says that there is none
        with safe_open(path, "pt") as file:
            prompt = file.get_tensor(PROMPT) if PROMPT in file.keys() else None  # noqa: SIM118 - no mapping
            tuned_on = (file.metadata() or {}).get(BACKBONE_SHA256) or _sha256_of_base(folder)
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"tuning.sources: {path} cannot be read: {error}; a source is the folder that fedhpc export wrote for a "
            "run with tuning.kind: prompt_tuning"
        ) from None
    if prompt is None or tuple(prompt.shape) != shape:
        found = f"no {PROMPT}" if prompt is None else f"a prompt of {tuple(prompt.shape)}"
        raise ConfigError(
            f"tuning.sources: {path} has {found}; {shape} is needed (tuning.num_tokens, width of the word embeddings)"
        )
    if tuned_on not in (None, sha256):
        raise ConfigError(
            f"tuning.sources: {path} was tuned on other weights than those of model.name: {backbone}; a source's run "
            "needs the same model"
        )
    return prompt.float()


def _sha256_of_base(folder: Path) -> str | None:
    """Of the model that an adapter without a sum names, if it is in a folder here."""
    from fedhpc.model.weight_files import weights_sha256

    try:
        base = json.loads((folder / CONFIG_FILE).read_text())["base_model_name_or_path"]
        return weights_sha256(base) if Path(base).is_dir() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
