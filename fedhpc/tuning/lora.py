"""LoRA: a change of low rank of the query and value projections.

LoRA: Low-Rank Adaptation of Large Language Models. Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen. ICLR 2022.
https://arxiv.org/abs/2106.09685.

Shapes: b examples, s positions, L layers, r rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fedhpc.config import Positive, PositiveFloat, TuningConfig
from fedhpc.job.deferred import Tensor, functional
from fedhpc.model.overlay import Edit, each_device
from fedhpc.registry import TUNINGS
from fedhpc.tuning.base import ModuleTuning, Rows
from fedhpc.tuning.peft_form import PeftForm

if TYPE_CHECKING:
    from fedhpc.model.pretrained import BackboneShape

PROJECTIONS = (
    ("attention.self.query", "attention.self.value"),
    ("attention.q_lin", "attention.v_lin"),
    ("self_attn.q_proj", "self_attn.v_proj"),
    ("attn.c_attn",),
    ("attention.query_key_value",),
    ("self_attn.query_key_value",),
    ("self_attention.query_key_value",),
    ("self_attn.qkv_proj",),
)
"""Query and value projections of a layer, or all three in one, in the architectures that have such names."""


@TUNINGS.register("lora")
class LoRA(ModuleTuning):
    """`lora_A.<module>` [L, r, in] and `lora_B.<module>` [L, out, r]; the change is alpha / r B A."""

    class Config(TuningConfig):
        """Keys."""

        rank: Positive = 8
        """Rank of the change, r."""
        alpha: PositiveFloat = 16.0
        """The change of a weight is alpha / r B A."""

    peft_type = "LORA"

    def __init__(self, config: Any, shape: BackboneShape, *, num_classes: int) -> None:
        from fedhpc.model.structure import read_structure

        super().__init__(config, shape, num_classes=num_classes)
        structure = read_structure(shape.name)
        self.modules = structure.first_match(PROJECTIONS, "tuning.kind: lora")
        self.scaling = config.alpha / config.rank
        for module in self.modules:
            inputs, outputs = structure.linears[module]
            self.per_layer[f"lora_A.{module}"] = (shape.num_layers, config.rank, inputs)
            self.per_layer[f"lora_B.{module}"] = (shape.num_layers, outputs, config.rank)

    def initial_scale(self, name: str) -> float:
        """B starts at zero, A with the standard deviation of PEFT's uniform distribution, 1 / sqrt(3 in)."""
        if name.startswith("lora_B"):
            return 0.0
        if name.startswith("lora_A"):
            return float((3 * self.per_layer[name][2]) ** -0.5)
        return super().initial_scale(name)

    def edit(self, module: str, rows: Sequence[Rows]) -> Edit:
        """See `ModuleTuning`."""

        def adapt(layer: int, inputs: Tensor, output: Tensor, sizes: Sequence[int]) -> Tensor:
            def of_device(place: int, x: Tensor) -> Tensor:
                a, b = (rows[place][f"lora_{part}.{module}"][layer].to(x) for part in "AB")
                return functional.linear(functional.linear(x, a), b * self.scaling)

            return output + each_device(of_device, inputs, sizes)

        return adapt

    def to_peft(self, tensors: Mapping[str, np.ndarray], model: Any, *, longest: int) -> PeftForm:
        """LoRA: `lora_A` [r, in] and `lora_B` [out, r] of each module from those of all layers [L, ...]."""
        from transformers.pytorch_utils import Conv1D

        from fedhpc.model.structure import read_structure

        inside = "" if model.base_model is model else f"{model.base_model_prefix}."
        layers = [f"{inside}{layer}" for layer in read_structure(self.shape.name).layers]
        return PeftForm(
            config={
                "peft_type": self.peft_type,
                "r": self.config.rank,
                "lora_alpha": self.config.alpha,
                "lora_dropout": 0.0,
                "bias": "none",
                "target_modules": [f"{layer}.{module}" for layer in layers for module in self.modules],
                "fan_in_fan_out": isinstance(model.get_submodule(f"{layers[0]}.{self.modules[0]}"), Conv1D),
            },
            tensors={
                f"base_model.model.{layer}.{module}.lora_{part}.weight": tensors[f"lora_{part}.{module}"][index]
                for index, layer in enumerate(layers)
                for module in self.modules
                for part in "AB"
            },
        )
