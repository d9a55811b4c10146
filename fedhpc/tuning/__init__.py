"""What is trained on the frozen backbone. A new tuning is one file: a class, registered; here its module is named.

PEFT holds one adapter a model; here devices train side by side, each with its own, and tensors lie layer by layer for
the exchange. The tests compare with PEFT what it has too, and export gives it adapters that it loads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fedhpc.registry import TUNINGS
from fedhpc.tuning import (  # noqa: F401
    adapter,
    attempt,
    instance_prompt,
    late_prompt,
    lora,
    prompt,
    prompt_tuning,
    weights,
)
from fedhpc.tuning.base import Tuning

if TYPE_CHECKING:
    from fedhpc.model.pretrained import BackboneShape


def make_tuning(config: Any, shape: BackboneShape, *, num_classes: int) -> Tuning:
    """The tuning that a configuration's section `tuning` names."""
    tuning: Tuning = TUNINGS[config.kind](config, shape, num_classes=num_classes)
    return tuning


__all__ = ["Tuning", "make_tuning"]
