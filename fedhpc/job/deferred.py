"""PyTorch, for modules that are imported to read a configuration: it is loaded when it is first used.

Such a module says ``from __future__ import annotations``, so that its annotations stay text.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torch.nn import functional
else:

    class _Deferred:
        def __init__(self, name: str) -> None:
            self._name = name

        def __getattr__(self, attribute: str) -> Any:
            return getattr(import_module(self._name), attribute)

    torch, nn, functional = _Deferred("torch"), _Deferred("torch.nn"), _Deferred("torch.nn.functional")
    Tensor = "torch.Tensor"

__all__ = ["Tensor", "functional", "nn", "torch"]
