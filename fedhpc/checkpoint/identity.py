"""What determines a run's numbers: settings, prepared data, backbone; and in what two runs differ."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from fedhpc.config import WITHOUT_EFFECT, Config, every_default, flatten, least_values

Identity = dict[str, Any]
"""What it is about -> text or number."""
DATA, MODEL = "prepared data: ", "backbone: "
"""Beginnings of keys."""
OLD_DATA, OLD_MODEL = "data", "model.name sha256"
"""Keys of identities that know data and backbone by one checksum each."""
NOT_SET = "<not set>"
OF_DATA = ("head", "kind", "tokenizer_sha256", "pad_id", "max_length", "template", "class_names", "word_ids", "metric")
OF_NO_ACCOUNT = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache", "architectures")
"""Keys of a backbone's configuration that fedhpc decides by itself, or on which nothing depends."""
LONGEST = 100
"""Characters of a value that is kept as it is; of a longer one there is a checksum."""


def data_identity(description: Mapping[str, Any]) -> Identity:
    """What identifies prepared data, whatever folder they are in and by whatever name their model was called.

    Args:
        description: the content of their description.json.
    """
    found = {key: description[key] for key in OF_DATA}
    for split, facts in description["splits"].items():
        found |= {f"{split} {name}": value for name, value in facts.items()}
    found |= {name: checksum(facts["sha256"]) for name, facts in description["files"].items()}
    return {f"{DATA}{key}": brief(value) for key, value in found.items()}


def model_identity(config: Mapping[str, Any], weights_sha256: str) -> Identity:
    """What identifies a backbone, wherever its files are.

    Args:
        config: its configuration as transformers reads it: what a config.json leaves out has its value, too.
    """
    found = {key: brief(value) for key, value in config.items() if key not in OF_NO_ACCOUNT}
    return {f"{MODEL}{key}": value for key, value in {**found, "weights": checksum(weights_sha256)}.items()}


def default_settings() -> Identity:
    """What counts where an identity leaves a setting out, because it is older than that."""
    return every_default() | flatten(Config.model_validate(least_values()).model_dump())


def differences(
    theirs: Mapping[str, Any], ours: Mapping[str, Any], where: str, defaults: Mapping[str, Any] | None = None
) -> list[str]:
    """A line for each key in which two runs' identities differ, but for the configuration's digest.

    Args:
        where: theirs is from.
        defaults: values of keys that one of them lacks.
    """
    known = defaults or {}
    keys = sorted({*theirs, *ours} - {"sha256", "tuning.sources"})  # the content of sources has a key of its own
    pairs = {key: tuple(side.get(key, known.get(key, NOT_SET)) for side in (theirs, ours)) for key in keys}
    return [
        f"{key}: {old} {where}, {new} now"
        for key, (old, new) in pairs.items()
        if old != new and not key.startswith(WITHOUT_EFFECT)
    ]


def brief(value: Any) -> str:
    """A value as an identity holds it."""
    text = value if isinstance(value, str) else json.dumps(_whole(value), sort_keys=True, default=str)
    return text if len(text) <= LONGEST else checksum(hashlib.sha256(text.encode()).hexdigest())


def _whole(value: Any) -> Any:
    """The value with 10000 for 10000.0, which are one number to Python and to a reader of JSON."""
    if isinstance(value, dict):
        return {str(key): _whole(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_whole(part) for part in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def checksum(sha256: str) -> str:
    """A checksum that may stand in a message."""
    return f"content {sha256[:12]}"
