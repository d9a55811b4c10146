"""`fedhpc keys`: every key of a configuration, with its type, default and meaning, those of plug-ins included.

`make keys` writes the tables of docs/configuration.md anew from the same source: the classes' docstrings.
"""

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fedhpc import yaml_files
from fedhpc.config import Config
from fedhpc.errors import ConfigError
from fedhpc.files import write_target
from fedhpc.job.tracker import TrackerConfig
from fedhpc.registry import SECTIONS, TRACKERS, Registry, load_plugins

TOP_LEVEL = "top level"
MARKER = re.compile(r"<!-- keys: (.+?) -->\n.*?<!-- end -->", re.DOTALL)
BOUNDS = {annotated_types.Gt: ">", annotated_types.Ge: "≥", annotated_types.Lt: "<", annotated_types.Le: "≤"}
TYPES = {int: "integer", float: "number", str: "text", bool: "true or false"}


@dataclass(frozen=True, kw_only=True)
class Key:
    """A key of a configuration."""

    name: str
    """Dotted."""
    parts: tuple[str, ...]
    """The parts of its section that have it; none where all do."""
    kind: str
    """Its type, in words."""
    default: str
    meaning: str


def section_names() -> list[str]:
    """The sections, and what stands outside of them."""
    return [TOP_LEVEL, *(name for name, field in Config.model_fields.items() if _is_section(field))]


def tables() -> list[str]:
    """What has a table of keys: the sections, and entries of `trackers`."""
    return [*section_names(), TRACKERS.section]


def keys_of(section: str) -> list[Key]:
    """The keys of a section, those of all registered parts included, common ones first.

    Raises:
        ConfigError: there is no such section.
    """
    if section == TRACKERS.section:
        return _own_keys(TRACKERS, TrackerConfig)
    if section == TOP_LEVEL:
        return list(_keys("", Config, [name for name, field in Config.model_fields.items() if not _is_section(field)]))
    if section not in section_names():
        raise ConfigError(f"{section!r} is no section; there are {', '.join(tables())}")
    common: Any = Config.model_fields[section].annotation
    registry = next((registry for registry in SECTIONS if registry.section == section), None)
    found = list(_keys(f"{section}.", common, common.model_fields))
    if registry is None:
        return found
    choice = next(key for key in found if key.name == f"{section}.{registry.key}")
    found[found.index(choice)] = _choice(choice, registry)
    return found + _own_keys(registry, common)


def keys_text(sections: Sequence[str]) -> str:
    """Sections with their keys, for a terminal."""
    lines: list[str] = []
    for section in sections:
        keys = keys_of(section)
        lines += ["", section if section == TOP_LEVEL else f"{section}: {_summary(section)}", ""]
        for key in keys:
            owners = f"  [{', '.join(key.parts)}]" if key.parts else ""
            lines.append(f"  {key.name}{owners}")
            lines.append(f"      {key.kind}; default: {key.default}")
            lines += textwrap.wrap(key.meaning, 96, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines[1:])


def keys_markdown(section: str) -> str:
    """A section's keys as a table; it does not list the parts that there are."""
    keys = keys_of(section)
    choices = {f"{registry.section}.{registry.key}": f"{registry.what}, by name" for registry in SECTIONS}
    with_parts = any(key.parts for key in keys)
    lines = ["| key | of | type | default | meaning |", "| --- | --- | --- | --- | --- |"]
    if not with_parts:
        lines = ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    for key in keys:
        cells = [f"`{key.name}`", *([", ".join(f"`{part}`" for part in key.parts)] if with_parts else [])]
        default = key.default if key.default == REQUIRED else f"`{key.default}`"
        kind = choices.get(key.name, key.kind)
        lines.append(f"| {' | '.join([*cells, kind, default, key.meaning])} |")
    return "\n".join(lines) + "\n"


def write_tables(path: Path) -> str:
    """Put the tables of all sections into a page, between `<!-- keys: SECTION -->` and `<!-- end -->`; the new text."""
    text = path.read_text(encoding="utf-8")
    new = MARKER.sub(lambda found: f"<!-- keys: {found[1]} -->\n\n{keys_markdown(found[1])}\n<!-- end -->", text)
    if new != text:
        write_target(path, new.encode())
    return new


def show_keys(section: str | None, plugins: Sequence[str] = ()) -> str:
    """What `fedhpc keys` prints."""
    load_plugins(plugins)
    return keys_text([section] if section else tables())


REQUIRED = "required"
NO_BOUND = 2**62
"""Of 64-bit integers; not worth a word."""


def _is_section(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)


def _summary(section: str) -> str:
    keys: Any = TrackerConfig if section == TRACKERS.section else Config.model_fields[section].annotation
    words: str = keys.__doc__
    return words.splitlines()[0].partition(";")[0].rstrip(".")


def _keys(prefix: str, section: type[BaseModel], names: Any, parts: tuple[str, ...] = ()) -> Iterator[Key]:
    for name in names:
        field = section.model_fields[name]
        yield Key(
            name=prefix + name,
            parts=parts,
            kind=words_of(Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation),
            default=REQUIRED if field.is_required() else _value(field.get_default(call_default_factory=True)),
            meaning=_meaning(section, name),
        )


def _own_keys(registry: Registry, common: type[BaseModel]) -> list[Key]:
    """The keys of parts; parts that mean the same by one have one line."""
    found: dict[tuple[str, str, str, str], list[str]] = {}
    for part_name, part in registry.items():
        own = [name for name in part.Config.model_fields if name not in common.model_fields]
        for key in _keys(f"{registry.section}.", part.Config, own):
            found.setdefault((key.name, key.kind, key.default, key.meaning), []).append(part_name)
    keys = [
        Key(name=name, kind=kind, default=default, meaning=meaning, parts=tuple(parts))
        for (name, kind, default, meaning), parts in found.items()
    ]
    order = list(dict.fromkeys(key.name for key in keys))
    return sorted(keys, key=lambda key: order.index(key.name))


def _choice(key: Key, registry: Registry) -> Key:
    """The key that names a part, with all parts that there are."""
    kind = ", ".join(f"`{name}`" for name in registry)
    return Key(name=key.name, parts=(), kind=kind, default=registry.default, meaning=key.meaning)


def _value(value: Any) -> str:
    return "null" if value is None else yaml_files.write([value]).strip().removeprefix("- ")


def _meaning(section: type[BaseModel], name: str) -> str:
    """The docstring under a field, wherever the class has it from."""
    for part in section.__mro__:
        if part not in (BaseModel, object) and name in (docs := _docstrings(part)):
            return docs[name]
    return ""


@cache
def _docstrings(section: type) -> dict[str, str]:
    """Field -> docstring under it, in one line; none where the class has no source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(section)))
    except (OSError, TypeError, SyntaxError):
        return {}
    (body,) = (node.body for node in tree.body if isinstance(node, ast.ClassDef))
    return {
        field.target.id: " ".join(text.value.value.split())
        for field, text in pairwise(body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }


def words_of(kind: Any) -> str:
    """A type in words: `integer > 0`, `number ≥ 0, < 1 or measured`."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        bounds = [f"{sign} {value:g}" for entry in _flat(arguments[1:]) for sign, value in _bound(entry)]
        return f"{words_of(arguments[0])} {', '.join(bounds)}".strip()
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in arguments)
    if origin in (Union, UnionType):
        return " or ".join(words_of(part) for part in arguments if part is not NoneType)
    if origin is list:
        return f"list of {_several(words_of(arguments[0]))}"
    return TYPES.get(kind, "mapping" if origin is dict else getattr(kind, "__name__", str(kind)))


def _several(words: str) -> str:
    first, space, rest = words.partition(" ")
    return f"{first}s{space}{rest}"


def _flat(metadata: Sequence[Any]) -> Iterator[Any]:
    """What Pydantic's Field holds, one by one."""
    for entry in metadata:
        yield from getattr(entry, "metadata", None) or [entry]


def _bound(entry: Any) -> Iterator[tuple[str, float]]:
    for kind, sign in BOUNDS.items():
        if isinstance(entry, kind) and (value := getattr(entry, kind.__name__.lower())) < NO_BOUND:
            yield sign, value
