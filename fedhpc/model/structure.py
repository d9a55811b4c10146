"""What a backbone is made of, without its weights: paths and shapes of parameters, in and outside its layers."""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from fedhpc.errors import ModelError
from fedhpc.model.pretrained import auto_class, load_pretrained

NOT_IN_LAYERS = "choose a tuning.kind that changes neither modules nor weights of layers, as prompt_tuning"
Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Structure:
    """Paths and shapes."""

    name: str
    layers: tuple[str, ...]
    """Path of each layer."""
    in_layer: dict[str, Shape]
    """Path within a layer -> shape of a parameter; the same in every layer."""
    outside: dict[str, Shape]
    """Parameters outside the layers that hidden states depend on."""
    linears: dict[str, tuple[int, int]]
    """Path within a layer of a dense module -> inputs, outputs."""

    def first_match(self, choices: Sequence[tuple[str, ...]], wanted_by: str) -> tuple[str, ...]:
        """The first of the choices whose modules every layer has, or ModelError."""
        for modules in choices:
            if all(module in self.linears for module in modules):
                return modules
        raise ModelError(
            f"{wanted_by}: model.name: {self.name} has none of the modules it needs; its layers have "
            f"{', '.join(self.linears)}; choose another tuning.kind"
        )

    def matching(self, patterns: Sequence[str]) -> tuple[str, ...]:
        """The dense modules of a layer that `tuning.targets` match, in their order; ModelError if one matches none."""
        for pattern in patterns:
            if not any(fnmatchcase(module, pattern) for module in self.linears):
                last = {module.rpartition(".")[2]: module for module in self.linears}
                near = get_close_matches(pattern, [*self.linears, *last], n=1, cutoff=0.5)
                hint = f"; did you mean {last.get(near[0], near[0])}?" if near else ""
                raise ModelError(
                    f"tuning.targets: {pattern} matches no linear module of model.name: {self.name}; its layers have "
                    f"{', '.join(self.linears)}{hint}"
                )
        return tuple(module for module in self.linears if any(fnmatchcase(module, pattern) for pattern in patterns))


@lru_cache(maxsize=8)
def read_structure(name: str) -> Structure:
    """The structure of a local or hub model, from its configuration alone.

    Raises:
        ModelError: its layers cannot be told apart, or are of several kinds.
    """
    config = load_pretrained(AutoConfig.from_pretrained, name)
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    layers = {path: module for path, module in model.named_modules() if isinstance(module, GradientCheckpointingLayer)}
    if not layers:
        raise ModelError(
            f"model.name: {name}: a {config.model_type} model has no layers that can be told apart; {NOT_IN_LAYERS}"
        )
    kinds = [{path: tuple(p.shape) for path, p in layer.named_parameters()} for layer in layers.values()]
    if any(kind != kinds[0] for kind in kinds):
        raise ModelError(
            f"model.name: {name}: a {config.model_type} model has layers of several kinds; {NOT_IN_LAYERS}"
        )
    return Structure(
        name=name,
        layers=tuple(layers),
        in_layer=kinds[0],
        outside={
            path: tuple(parameter.shape)
            for path, parameter in model.named_parameters()
            if not path.startswith((*(f"{layer}." for layer in layers), "pooler."))
        },
        linears={
            path: _sizes(module)
            for path, module in next(iter(layers.values())).named_modules()
            if isinstance(module, nn.Linear | Conv1D)
        },
    )


def outline(name: str, *, head: str, kind: str) -> Any:
    """The model as `auto_class` loads it, without its weights."""
    config = load_pretrained(AutoConfig.from_pretrained, name)
    with torch.device("meta"):
        return auto_class(head=head, kind=kind).from_config(config)


def _sizes(module: nn.Module) -> tuple[int, int]:
    """Inputs and outputs; GPT-2's module stores its weight the other way round."""
    rows, columns = module.weight.shape  # type: ignore[misc]
    return (int(rows), int(columns)) if isinstance(module, Conv1D) else (int(columns), int(rows))
