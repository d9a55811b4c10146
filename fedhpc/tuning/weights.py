"""The backbone's own parameters, all of them or the biases: what is trained is their change, which starts at zero.

So the server needs no backbone, weight decay pulls towards the pretrained model, and the change of a 16-bit backbone is
kept in float32. The language-model head stays as it is: only the class words' rows of it are ever computed.

BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models. Ben-Zaken, Goldberg,
Ravfogel. ACL 2022. https://arxiv.org/abs/2106.10199.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fedhpc.errors import ModelError
from fedhpc.job.deferred import Tensor
from fedhpc.model.overlay import Overlay
from fedhpc.registry import TUNINGS
from fedhpc.tuning.base import Params, Tuning

if TYPE_CHECKING:
    from fedhpc.data.prepared import Batch
    from fedhpc.model.backbone import Backbone
    from fedhpc.model.pretrained import BackboneShape


@TUNINGS.register("full")
class FullTuning(Tuning):
    """`layer.<path>` [L, ...] and, outside the layers, `model.<path>`: changes of the parameters at these paths."""

    packable = False
    changes_weights = True
    reads_structure = True
    without_effect = ("key.bias", "k_proj.bias")
    """It moves all scores of a query alike, which the softmax cancels; what gradient there is comes from rounding."""
    only = ""
    """Parameters whose path does not end so stay as they are."""

    def __init__(self, config: Any, shape: BackboneShape, *, num_classes: int) -> None:
        from fedhpc.model.structure import read_structure

        super().__init__(config, shape, num_classes=num_classes)
        structure = read_structure(shape.name)
        inside = {path: size for path, size in structure.in_layer.items() if path.endswith(self.only)}
        outside = {path: size for path, size in structure.outside.items() if path.endswith(self.only)}
        if not inside:
            raise ModelError(
                f"tuning.kind: {config.kind}: model.name: {shape.name} has no biases in its layers; choose another "
                "tuning.kind"
            )
        self.prefixes = structure.layers
        self.per_layer = {f"layer.{path}": (shape.num_layers, *size) for path, size in inside.items()}
        self.shared = {**{f"model.{path}": size for path, size in outside.items()}, **self.shared}

    def initial_scale(self, name: str) -> float:
        """No change."""
        return 0.0 if name.startswith(("layer.", "model.")) else super().initial_scale(name)

    def overlay(
        self,
        backbone: Backbone,
        params: Sequence[Params],
        batch: Batch,
        dropout_seeds: Sequence[int] | None,
    ) -> Overlay:
        """See `Tuning`."""
        (own,) = params
        changes: dict[str, Tensor] = {}
        for name, tensor in own.items():
            kind, _, path = name.partition(".")
            if kind == "layer":
                rows = zip(self.prefixes, self.rows(tensor), strict=True)
                changes |= {f"{prefix}.{path}": row for prefix, row in rows}
            elif kind == "model":
                changes[path] = tensor
        frozen = backbone.parameters_by_path
        weights = {path: (frozen[path] + change).to(frozen[path].dtype) for path, change in changes.items()}
        return Overlay(weights=weights)


@TUNINGS.register("bitfit")
class BitFit(FullTuning):
    """The biases."""

    only = "bias"
