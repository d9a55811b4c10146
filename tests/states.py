"""A small tuning, and bits of states to compare."""

import numpy as np

from fedhpc.config import section_of
from fedhpc.model.pretrained import BackboneShape
from fedhpc.registry import TUNINGS
from fedhpc.tuning import make_tuning

SHAPE = BackboneShape(
    name="",
    num_layers=4,
    num_heads=1,
    num_key_value_heads=1,
    head_dim=2,
    hidden_size=2,
    embedding_width=2,
    output_width=2,
    initializer_range=0.1,
    max_positions=None,
)
TUNING = make_tuning(section_of(TUNINGS, num_tokens=3, head="linear"), SHAPE, num_classes=5)
"""Prompts of 4 layers, T = 3, D = 2, and a linear head."""
SOME, ALL = (1, 3), (0, 1, 2, 3)


def vector(seed, size):
    """Random floats."""
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32)


def bits(value):
    """Something that is equal only for what is the same to the last bit."""
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return value.dtype, value.shape, value.tobytes()
    if isinstance(value, tuple):
        return tuple(map(bits, value))
    return bits(vars(value)) if hasattr(value, "__dict__") else value
