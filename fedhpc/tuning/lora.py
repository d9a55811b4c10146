"""LoRA: a change of low rank of the query and value projections.

LoRA: Low-Rank Adaptation of Large Language Models. Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen. ICLR 2022.
https://arxiv.org/abs/2106.09685.

Shapes: b examples, s positions, L layers, r rank.
"""

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional

from fedhpc.config import TuningConfig
from fedhpc.model.overlay import Edit, each_device
from fedhpc.model.pretrained import BackboneShape
from fedhpc.model.structure import read_structure
from fedhpc.tuning.base import ModuleTuning, Rows

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


class LoRA(ModuleTuning):
    """`lora_A.<module>` [L, r, in] and `lora_B.<module>` [L, out, r]; the change is alpha / r B A."""

    def __init__(self, config: TuningConfig, shape: BackboneShape, *, num_classes: int) -> None:
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

    def edit(self, module: str, rows: Sequence[Rows], sizes: Sequence[int]) -> Edit:
        """See :class:`ModuleTuning`."""

        def adapt(layer: int, inputs: Tensor, output: Tensor) -> Tensor:
            def of_device(place: int, x: Tensor) -> Tensor:
                a, b = (rows[place][f"lora_{part}.{module}"][layer].to(x) for part in "AB")
                return functional.linear(functional.linear(x, a), b * self.scaling)

            return output + each_device(of_device, inputs, sizes)

        return adapt
