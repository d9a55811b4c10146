"""How PEFT holds a tuning: its configuration and tensors.

PEFT: https://huggingface.co/docs/peft/developer_guides/checkpoint.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, kw_only=True)
class PeftForm:
    """An adapter as PEFT saves it."""

    config: dict[str, Any]
    """adapter_config.json."""
    tensors: dict[str, np.ndarray]
    """adapter_model.safetensors."""
    backbone_sha256: str = ""
    first_position: int | None = None
    """Of a text, to be passed to the model; None: what it takes by itself."""
    output_offset: int = 0
    """Where a text begins in the model's output."""
