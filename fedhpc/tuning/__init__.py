"""What is trained on the frozen backbone. A new tuning is one file: a class, registered.

PEFT holds one adapter a model; here devices train side by side, each with its own, and tensors lie layer by layer for
the exchange. The tests compare with PEFT what it has too, and export gives it adapters that it loads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fedhpc.registry import TUNINGS
from fedhpc.tuning.adapter import Adapter
from fedhpc.tuning.attempt import Attempt
from fedhpc.tuning.base import ModuleTuning, TokensConfig, Tuning
from fedhpc.tuning.ffa_lora import FFALoRA
from fedhpc.tuning.instance_prompt import InstancePrompt
from fedhpc.tuning.late_prompt import LatePrompt
from fedhpc.tuning.lora import LoRA
from fedhpc.tuning.prompt import DeepPrompts
from fedhpc.tuning.prompt_tuning import PromptTuning
from fedhpc.tuning.weights import BitFit, FullTuning

if TYPE_CHECKING:
    from fedhpc.model.pretrained import BackboneShape


def make_tuning(
    config: Any, shape: BackboneShape, *, num_classes: int, keep: Sequence[str] = (), freezes_others: bool = False
) -> Tuning:
    """The tuning that a configuration's section `tuning` names.

    Args:
        config: that section.
        shape: of the backbone.
        num_classes: C.
        keep: `exchange.keep`.
        freezes_others: `selection.local_layers: frozen`.

    Raises:
        ConfigError: ``keep`` has no sense here.
    """
    tuning: Tuning = TUNINGS[config.kind](config, shape, num_classes=num_classes)
    tuning.keep, tuning.freezes_others = keep, freezes_others
    tuning.check_keep()
    return tuning


__all__ = [
    "Adapter",
    "Attempt",
    "BitFit",
    "DeepPrompts",
    "FFALoRA",
    "FullTuning",
    "InstancePrompt",
    "LatePrompt",
    "LoRA",
    "ModuleTuning",
    "PromptTuning",
    "TokensConfig",
    "Tuning",
    "make_tuning",
]
