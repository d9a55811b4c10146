"""Scales on what the attention's projections put out.

Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning. Liu, Tam, Muqeeth, Mohta,
Huang, Bansal, Raffel. NeurIPS 2022. https://arxiv.org/abs/2205.05638, for the values alone.
"""

import torch

import fedhpc
from fedhpc.model.overlay import each_device
from fedhpc.model.structure import read_structure


@fedhpc.register_tuning("scaling")
class Scaling(fedhpc.tuning.ModuleTuning):
    """`scale.<module>` [L, out]; a module's output is multiplied by 1 + scale."""

    class Config(fedhpc.TuningConfig):
        """Keys."""

        strength: float = 1.0
        """Of the scales."""

    def __init__(self, config, shape, *, num_classes):
        super().__init__(config, shape, num_classes=num_classes)
        structure = read_structure(shape.name)
        choices = (("self_attn.v_proj",), ("attention.self.value",))
        self.modules = structure.first_match(choices, "tuning.kind: scaling")
        for module in self.modules:
            _, outputs = structure.linears[module]
            self.per_layer[f"scale.{module}"] = (shape.num_layers, outputs)

    def edit(self, module, rows):
        """See :class:`fedhpc.tuning.ModuleTuning`."""

        def adapt(layer, inputs, output, sizes):
            def of_device(place, x):
                scale = rows[place][f"scale.{module}"][layer].to(x)
                return torch.addcmul(x, x, scale, value=self.config.strength)

            return each_device(of_device, output, sizes)

        return adapt
