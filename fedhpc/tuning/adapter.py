"""Adapters: a small network with a skip connection behind each layer's attention and feed-forward block.

Parameter-Efficient Transfer Learning for NLP. Houlsby, Giurgiu, Jastrzebski, Morrone, de Laroussilhe, Gesmundo,
Attariyan, Gelly. ICML 2019. https://arxiv.org/abs/1902.00751, figure 2. The layer norms, which are trained there too,
stay frozen here.

Shapes: b examples, s positions, L layers, H hidden size, m bottleneck.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fedhpc.config.sections import Positive, TuningConfig
from fedhpc.job.deferred import Tensor, functional
from fedhpc.model.overlay import Edit, each_device
from fedhpc.registry import TUNINGS
from fedhpc.tuning.base import ModuleTuning, Rows

if TYPE_CHECKING:
    from fedhpc.model.pretrained import BackboneShape

BLOCKS = (
    ("attention.output.dense", "output.dense"),
    ("attention.out_lin", "ffn.lin2"),
    ("self_attn.o_proj", "mlp.down_proj"),
    ("self_attn.o_proj", "mlp.c_proj"),
    ("attn.c_proj", "mlp.c_proj"),
    ("attention.dense", "mlp.dense_4h_to_h"),
    ("self_attention.dense", "mlp.dense_4h_to_h"),
    ("self_attn.out_proj", "fc2"),
    ("self_attn.dense", "mlp.fc2"),
)
"""Last module of the attention and of the feed-forward block of a layer, in the architectures that have such names."""


@TUNINGS.register("adapter")
class Adapter(ModuleTuning):
    """`down.<module>` [L, m, H], `up.<module>` [L, H, m] and their biases, for the two modules of BLOCKS."""

    class Config(TuningConfig):
        """Keys."""

        bottleneck: Positive = 32
        """Width of the small network."""

    def __init__(self, config: Any, shape: BackboneShape, *, num_classes: int) -> None:
        from fedhpc.model.structure import read_structure

        super().__init__(config, shape, num_classes=num_classes)
        num_layers, width, m = shape.num_layers, shape.hidden_size, config.bottleneck
        self.modules = read_structure(shape.name).first_match(BLOCKS, "tuning.kind: adapter")
        for module in self.modules:
            self.per_layer |= {
                f"down.{module}": (num_layers, m, width),
                f"down.{module}.bias": (num_layers, m),
                f"up.{module}": (num_layers, width, m),
                f"up.{module}.bias": (num_layers, width),
            }

    def edit(self, module: str, rows: Sequence[Rows]) -> Edit:
        """See `ModuleTuning`."""

        names = [f"{part}.{module}{kind}" for part in ("down", "up") for kind in ("", ".bias")]

        def adapt(layer: int, inputs: Tensor, output: Tensor, sizes: Sequence[int]) -> Tensor:
            def of_device(place: int, x: Tensor) -> Tensor:
                down, down_bias, up, up_bias = (rows[place][name][layer].to(x) for name in names)
                return x + functional.linear(functional.gelu(functional.linear(x, down, down_bias)), up, up_bias)

            return each_device(of_device, output, sizes)

        return adapt
