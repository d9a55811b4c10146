"""The configuration of a run: its sections, what goes together, the file that it is read from."""

from fedhpc.config.config import (
    WITHOUT_EFFECT,
    Config,
    every_default,
    flatten,
    least_values,
    section_of,
    unused_keys,
)

__all__ = ["WITHOUT_EFFECT", "Config", "every_default", "flatten", "least_values", "section_of", "unused_keys"]
