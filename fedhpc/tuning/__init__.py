"""What is trained on the frozen backbone. A new tuning is a file here and a line in TUNINGS."""

from fedhpc.config import TuningConfig
from fedhpc.models import BackboneShape
from fedhpc.tuning.base import Tuning
from fedhpc.tuning.prompt import DeepPrompts

TUNINGS: dict[str, type[Tuning]] = {"prompt": DeepPrompts}


def make_tuning(config: TuningConfig, shape: BackboneShape, *, num_classes: int) -> Tuning:
    """The tuning that a configuration names."""
    return TUNINGS[config.kind](config, shape, num_classes=num_classes)


__all__ = ["TUNINGS", "Tuning", "make_tuning"]
