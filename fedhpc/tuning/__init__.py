"""What is trained on the frozen backbone. A new tuning is a file here and a line in TUNINGS.

PEFT holds one adapter a model; here devices train side by side, each with its own, and tensors lie layer by layer for
the exchange. The tests compare with PEFT what it has too, and export gives it adapters that it loads.
"""

from fedhpc.config import TuningConfig
from fedhpc.model.pretrained import BackboneShape
from fedhpc.tuning.adapter import Adapter
from fedhpc.tuning.attempt import Attempt
from fedhpc.tuning.base import Tuning
from fedhpc.tuning.instance_prompt import InstancePrompt
from fedhpc.tuning.late_prompt import LatePrompt
from fedhpc.tuning.lora import LoRA
from fedhpc.tuning.prompt import DeepPrompts
from fedhpc.tuning.prompt_tuning import PromptTuning
from fedhpc.tuning.weights import BitFit, FullTuning

TUNINGS: dict[str, type[Tuning]] = {
    "prompt": DeepPrompts,
    "prompt_tuning": PromptTuning,
    "late_prompt": LatePrompt,
    "instance_prompt": InstancePrompt,
    "attempt": Attempt,
    "adapter": Adapter,
    "lora": LoRA,
    "bitfit": BitFit,
    "full": FullTuning,
}


def make_tuning(config: TuningConfig, shape: BackboneShape, *, num_classes: int) -> Tuning:
    """The tuning that a configuration names."""
    return TUNINGS[config.kind](config, shape, num_classes=num_classes)


__all__ = ["TUNINGS", "Tuning", "make_tuning"]
