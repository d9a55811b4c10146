"""LoRA: a change of low rank of the query and value projections, or of other linear modules of the layers.

LoRA: Low-Rank Adaptation of Large Language Models. Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen. ICLR 2022.
https://arxiv.org/abs/2106.09685. A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA. Kalajdzievski. 2023.
https://arxiv.org/abs/2312.03732 (rsLoRA).

Shapes: b examples, s positions, L layers, r rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field

from fedhpc.config.sections import Positive, PositiveFloat, Probability, TuningConfig
from fedhpc.errors import ConfigError
from fedhpc.job.deferred import Tensor, functional, torch
from fedhpc.methods.updates import Layout, Vector
from fedhpc.model.overlay import Edit, Overlay, each_device
from fedhpc.registry import TUNINGS
from fedhpc.seeding import derive_seed, generator
from fedhpc.tuning.base import ModuleTuning, Params, Rows, dropout
from fedhpc.tuning.peft_form import PeftForm

if TYPE_CHECKING:
    from fedhpc.data.prepared import Batch
    from fedhpc.model.backbone import Backbone
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
Targets = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]
Ranks = Annotated[list[Positive], Field(min_length=1)]


@TUNINGS.register("lora")
class LoRA(ModuleTuning):
    """`lora_A.<module>` [L, r, in] and `lora_B.<module>` [L, out, r]; the change is alpha / r B A."""

    class Config(TuningConfig):
        """Keys."""

        rank: Positive = 8
        """Rank of the change, r."""
        ranks: Ranks | dict[str, Positive] | None = None
        """Devices' own ranks, up to `rank`: a list of which the seed draws one for each device, or a rank for each
        device by its name, where `federation.partition: column` gives them names. A device trains the first r_i of the
        r components; the others are zero there and in its upload, which stays as long."""
        alpha: PositiveFloat = 16.0
        """The change of a weight is alpha / r B A."""
        rslora: bool = False
        """alpha / sqrt(r) in place of alpha / r (rsLoRA)."""
        targets: Targets | Literal["all-linear"] | None = None
        """Linear modules of the layers that are changed: all, or those whose path within a layer one of these patterns
        matches, as `self_attn.*_proj`; query and value projections unless given."""
        dropout: Probability = 0.0
        """Dropout on what enters A during training."""

        @property
        def draws(self) -> bool:
            """See `fedhpc.config.sections.TuningConfig`."""
            return self.dropout > 0

    peft_type = "LORA"
    has_factors = True

    def __init__(self, config: Any, shape: BackboneShape, *, num_classes: int) -> None:
        from fedhpc.model.structure import read_structure

        super().__init__(config, shape, num_classes=num_classes)
        structure = read_structure(shape.name)
        if config.targets is None:
            self.modules = structure.first_match(PROJECTIONS, "tuning.kind: lora")
        else:
            self.modules = structure.matching(["*"] if config.targets == "all-linear" else config.targets)
        self._on_backbone: tuple[Mapping[str, np.ndarray], dict[str, Tensor]] | None = None
        """`added`, and the same in the backbone's type where it computes."""
        self.ranks: list[int] = []
        """Of each device, where they differ."""
        self.scaling = config.alpha / (config.rank**0.5 if config.rslora else config.rank)
        for module in self.modules:
            inputs, outputs = structure.linears[module]
            self.per_layer[f"lora_A.{module}"] = (shape.num_layers, config.rank, inputs)
            self.per_layer[f"lora_B.{module}"] = (shape.num_layers, outputs, config.rank)

    @classmethod
    def check(cls, config: Any) -> None:
        """See `ModuleTuning`; no device has more than all components."""
        super().check(config)
        ranks, rank = config.tuning.ranks or [], config.tuning.rank
        if (largest := max(ranks.values() if isinstance(ranks, dict) else ranks, default=0)) > rank:
            raise ConfigError(f"tuning.ranks: {largest} is more than tuning.rank: {rank}, which the exchange holds")

    def know_devices(self, seed: int, num_devices: int, names: Sequence[str]) -> None:
        """See `Tuning`; every device's rank."""
        ranks = self.config.ranks
        if isinstance(ranks, list):
            draws = (generator(seed, purpose="rank", device=device) for device in range(num_devices))
            self.ranks = [int(draw.choice(ranks)) for draw in draws]
        elif ranks is not None:
            if not names:
                raise ConfigError(
                    "tuning.ranks: devices have no names here; give a list of ranks, or federation.partition: column"
                )
            if odd := sorted({*names} ^ {*ranks}):
                reason = "has no rank" if odd[0] in names else "is no device"
                raise ConfigError(f"tuning.ranks: {odd[0]!r} {reason}; there are {', '.join(sorted(names))}")
            self.ranks = [ranks[name] for name in names]

    def on_device(self, tensors: dict[str, np.ndarray], device: int) -> dict[str, np.ndarray]:
        """See `Tuning`; its leading components. Zeros on both sides have no gradient and stay zero."""
        if self.ranks:
            for module in self.modules:
                tensors[f"lora_A.{module}"][:, self.ranks[device] :] = 0
                tensors[f"lora_B.{module}"][..., self.ranks[device] :] = 0
        return tensors

    @property
    def added_layout(self) -> Layout:
        """See `Tuning`."""
        shapes = {
            module: (self.per_layer[f"lora_B.{module}"], self.per_layer[f"lora_A.{module}"]) for module in self.modules
        }
        return Layout({module: (*b[:2], a[2]) for module, (b, a) in shapes.items()})

    def with_products(self, terms: Sequence[Vector], layers: Sequence[int]) -> Mapping[str, np.ndarray]:
        """See `Tuning`; with the scaling of the changes."""
        views = [self.exchanged(layers).views(term) for term in terms]
        added = {}
        for module, shape in self.added_layout.shapes.items():
            added[module] = self.added[module].copy() if self.added else np.zeros(shape, np.float32)
            for row, layer in enumerate(layers):
                left = np.concatenate([each[f"lora_B.{module}"][row] for each in views], axis=1, dtype=np.float64)
                right = np.concatenate([each[f"lora_A.{module}"][row] for each in views], dtype=np.float64)
                added[module][layer] += self.scaling * (left @ right)
        return added

    def initial_scale(self, name: str) -> float:
        """B starts at zero, A with the standard deviation of PEFT's uniform distribution, 1 / sqrt(3 in)."""
        if name.startswith("lora_B"):
            return 0.0
        if name.startswith("lora_A"):
            return float((3 * self.per_layer[name][2]) ** -0.5)
        return super().initial_scale(name)

    def overlay(
        self,
        backbone: Backbone,
        params: Sequence[Params],
        batch: Batch,
        dropout_seeds: Sequence[int] | None,
    ) -> Overlay:
        """See `Tuning`."""
        if self._on_backbone is None or self._on_backbone[0] is not self.added:
            placed = {module: torch.from_numpy(weight).to(backbone.base.dtype) for module, weight in self.added.items()}
            self._on_backbone = self.added, {name: weight.to(backbone.torch_device) for name, weight in placed.items()}
        overlay = super().overlay(backbone, params, batch, dropout_seeds)
        edits = overlay.edits
        if self.config.dropout and dropout_seeds is not None:
            edits = {module: self._dropping(module, edit, dropout_seeds) for module, edit in edits.items()}
        added = self._on_backbone[1]
        return replace(overlay, edits={module: _adding(edit, added.get(module)) for module, edit in edits.items()})

    def _dropping(self, module: str, edit: Edit, seeds: Sequence[int]) -> Edit:
        """The edit, with dropout on its input: in every layer and module other elements."""

        def dropped(layer: int, inputs: Tensor, output: Tensor, sizes: Sequence[int]) -> Tensor:
            def of_device(place: int, x: Tensor) -> Tensor:
                return dropout(x, self.config.dropout, derive_seed(seeds[place], purpose=f"{layer} {module}"))

            return edit(layer, each_device(of_device, inputs, sizes), output, sizes)

        return dropped

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

        rank, alpha, rslora = self.config.rank, self.config.alpha, self.config.rslora
        if self.added:
            tensors, rank = self._whole_changes(tensors)
            alpha, rslora = rank, False
        inside = "" if model.base_model is model else f"{model.base_model_prefix}."
        layers = [f"{inside}{layer}" for layer in read_structure(self.shape.name).layers]
        return PeftForm(
            config={
                "peft_type": self.peft_type,
                "r": rank,
                "lora_alpha": alpha,
                "use_rslora": rslora,
                "lora_dropout": self.config.dropout,
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

    def _whole_changes(self, tensors: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], int]:
        """Factors of each change and what was added to its weight, together of any rank; and that rank.

        The scaling is one, and the product with the identity exact.
        """
        shapes = self.added_layout.shapes
        rank = max(min(shape[1:]) for shape in shapes.values())
        found: dict[str, np.ndarray] = {}
        for module, (num_layers, outputs, inputs) in shapes.items():
            change = self.scaling * (tensors[f"lora_B.{module}"] @ tensors[f"lora_A.{module}"]) + self.added[module]
            a, b = np.zeros((num_layers, rank, inputs), np.float32), np.zeros((num_layers, outputs, rank), np.float32)
            if outputs <= inputs:
                a[:, :outputs], b[:] = change, np.eye(outputs, rank)
            else:
                a[:], b[..., :inputs] = np.eye(rank, inputs), change
            found |= {f"lora_A.{module}": a, f"lora_B.{module}": b}
        return found, rank


def _adding(edit: Edit, added: Tensor | None) -> Edit:
    """The edit, of a module to whose weights [L, out, in] something was added; its input is not dropped from."""
    if added is None:
        return edit

    def adapt(layer: int, inputs: Tensor, output: Tensor, sizes: Sequence[int]) -> Tensor:
        return edit(layer, inputs, output + functional.linear(inputs, added[layer].to(inputs)), sizes)

    return adapt
