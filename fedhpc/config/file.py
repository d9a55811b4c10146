"""Configuration files: YAML with `base:`, `--set` overrides, every error reported at once."""

import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from fedhpc.config import Config, every_default, flatten, least_values
from fedhpc.config.sections import CLOCK
from fedhpc.errors import ConfigError
from fedhpc.registry import SECTIONS
from fedhpc.yaml_files import YAML_ERRORS, read, read_value, text_of

Overrides = Sequence[str] | Mapping[str, Any]
"""Texts `key.sub=value` as of the command line, or dotted keys with their values."""


def load_config(path: str | Path, overrides: Overrides = ()) -> Config:
    """A run's configuration: a YAML file and the file its `base` names, what is to be different, all of it checked.

    Args:
        path: the file.
        overrides: dotted keys with their values, or texts of the form ``key.sub=value`` as of ``--set``.

    Examples:
        >>> config = fedhpc.load_config("reviews.yaml", {"federation.rounds": 2, "server.method": "fedavg"})
        >>> config.federation.rounds
        2

    Raises:
        ConfigError: with all that is wrong, one line each.
    """
    config, problems = check_values(read_values(path), overrides)
    if config is None:
        raise ConfigError(f"{path}: " + "\n  ".join([f"{len(problems)} problem(s)", *problems]))
    return config


def check_values(values: dict[str, Any], overrides: Overrides = ()) -> tuple[Config | None, list[str]]:
    """The configuration, or all that is wrong with it, one line each; the overrides change `values`, too."""
    if isinstance(overrides, Mapping):
        found = [set_value(values, key, value, f"{key}={value!r}") for key, value in overrides.items()]
    else:
        found = [apply_override(values, text) for text in overrides]
    problems = list(filter(None, found))
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        return None, problems + describe(error.errors())
    except ConfigError as error:
        return None, [*problems, str(error)]
    return (None, problems) if problems else (config, [])


def read_clock(overrides: Sequence[str]) -> dict[str, Any]:
    """`simulation.KEY=VALUE` as keys and values of the simulated clock, which a finished run may have anew.

    Raises:
        ConfigError: with all that is wrong, one line each; among it keys that decide more than the time.
    """
    config, problems = check_values(least_values(), overrides)
    given = [text.partition("=")[0].strip() for text in overrides]
    free = [f"simulation.{key}" for key in CLOCK]
    problems += [f"--set {key}: of finished runs only {', '.join(free)} can be set" for key in given if key not in free]
    if config is None or problems:
        raise ConfigError("\n  ".join([f"--set: {len(problems)} problem(s)", *problems]))
    return {key.partition(".")[2]: flatten(config.model_dump())[key] for key in given}


def read_values(path: str | Path, chain: tuple[str, ...] = ()) -> dict[str, Any]:
    """What a configuration file and the file its `base` names say, not yet validated.

    Args:
        chain: the files whose `base` has led here.

    Raises:
        ConfigError: a file cannot be read.
    """
    path = Path(path)
    values = read_yaml(path)
    if (real := os.path.realpath(path)) in chain:
        raise ConfigError(f"{path}: base: names a file that leads back to itself")
    values = {key: value for key, value in values.items() if value is not None}  # `server:` with nothing under it
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base: must be the name of a file, found {base!r}")
    return _merge(read_values(path.parent / base, (*chain, real)), values)


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file.

    Raises:
        ConfigError: it is no such file.
    """
    try:
        values = read(text_of(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a configuration file: {error}") from None
    except YAML_ERRORS as error:
        raise ConfigError(f"{path}: is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must hold keys and values, found {type(values).__name__}")
    return values


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _merge(base[key], value) if both else value
    return merged


def apply_override(values: dict[str, Any], text: str) -> str | None:
    """Change a file's values as `key.sub=value` says; what is wrong with that, if anything is."""
    key, equals, raw = text.partition("=")
    if not equals or not key:
        return f"--set {text}: must have the form key.sub=value"
    try:
        value = read_value(raw)
    except YAML_ERRORS as error:
        return f"--set {text}: the value is not valid YAML: {str(error).splitlines()[0]}"
    return set_value(values, key, value, f"--set {text}")


def set_value(values: dict[str, Any], key: str, value: Any, who: str) -> str | None:
    """Change one of a file's values, by its dotted key; what is wrong with that, said by ``who``, if anything is."""
    *sections, leaf = key.strip().split(".")
    for section in sections:
        inner = values.get(section, {})
        if not isinstance(inner, dict):
            return f"{who}: {section} is not a section"
        values[section] = values = dict(inner)  # an alias may have made two sections one
    values[leaf] = value
    return None


def describe(errors: list[ErrorDetails]) -> list[str]:
    """One line for each key at fault: the key, what is valid, what was found."""
    expected: dict[tuple[str, str], list[str]] = {}
    lines = []
    for details in errors:
        key = _key_of(details)
        if details["type"] == "extra_forbidden" and key in known_keys():
            section, _, leaf = key.rpartition(".")
            lines.append(f"{key}: in a file this key stands in its section: {section}: {{{leaf}: ...}}")
        elif details["type"] == "extra_forbidden":
            lines.append(f"{key}: unknown key{suggestion(key)}")
        elif details["type"] == "missing":
            lines.append(f"{key}: is required")
        elif details["type"] == "value_error":
            lines.append(details["msg"].removeprefix("Value error, "))
        else:
            valid = details["msg"].partition(" should ")[2].removeprefix("be ")
            expected.setdefault((key, repr(details["input"])), []).append(valid)
    own = {f"{registry.section}.{registry.key}" for registry in SECTIONS}
    advice = dict.fromkeys(own, "; one of your own needs its module under plugins:")
    return lines + [
        f"{key}: should {'' if valid[0].startswith('have ') else 'be '}{' or '.join(valid)}, found {found}"
        f"{advice.get(key, '')}"
        for (key, found), valid in expected.items()
    ]


def _key_of(details: ErrorDetails) -> str:
    """The dotted key; Pydantic adds the branch of a union to it, which no user knows."""
    location = [str(part) for part in details["loc"]]
    about_value = details["type"] not in ("extra_forbidden", "missing")
    while about_value and len(location) > 1 and ".".join(location) not in known_keys():
        location.pop()
    return ".".join(location)


def known_keys() -> list[str]:
    """Every key of a configuration, sections and the keys of all registered parts included, dotted."""
    keys = [key for key in _keys_of(Config) if key not in _OF_PARTS]
    parts = every_default()
    for registry in SECTIONS:
        place = keys.index(registry.section) + 1
        keys[place:place] = [key for key in parts if key.startswith(f"{registry.section}.")]
    return keys


def _keys_of(section: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in section.model_fields.items():
        kind = field.annotation
        keys.append(prefix + name)
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            keys += _keys_of(kind, f"{prefix}{name}.")
    return keys


_OF_PARTS = {key for key in _keys_of(Config) if key.startswith(tuple(f"{registry.section}." for registry in SECTIONS))}
"""Keys that `every_default` knows, too."""


def suggestion(key: str) -> str:
    """What an unknown key was perhaps meant to be."""
    section, _, leaf = key.rpartition(".")
    keys = known_keys()
    same_section = [known for known in keys if known.rpartition(".")[0] == section]
    near = (
        difflib.get_close_matches(key, same_section, n=1)
        or [known for known in keys if known.rpartition(".")[2] == leaf][:1]
        or difflib.get_close_matches(key, keys, n=1)
    )
    return f"; did you mean {near[0]}?" if near else f"; valid here: {', '.join(same_section)}"
