"""YAML as it is meant: scalars of YAML 1.2's core schema, and no key twice.

PyYAML follows YAML 1.1, where `0042` is 34, `1:30` is 90, `no` is false, `2026-01-02` a date and `5e-3` a text; it
keeps the last of equal keys. Here numbers are decimal, `1_000` is one of them.
https://yaml.org/spec/1.2.2/#103-core-schema
"""

import re
from pathlib import Path
from typing import Any

import yaml

YAML_ERRORS = (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError)
"""PyYAML lets impossible numbers and tags through as what Python raises, deep nesting as RecursionError."""

_TAG = "tag:yaml.org,2002:"
_NOT_TEXT = {
    "null": r"(~|null|Null|NULL|)\Z",
    "bool": r"(true|True|TRUE|false|False|FALSE)\Z",
    "int": r"[-+]?[0-9]+(_[0-9]+)*\Z",
    "float": r"([-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))\Z",
    "merge": r"<<\Z",
}
"""Type -> the plain scalars that are of it; the first that matches counts."""
LARGEST = 1 << 24
"""Bytes of a file that may be one of these; some devices never end."""
_QUOTED = re.compile(r'"(\\.|[^"\\])*"|\'[^\']*\'')
_COMMENT = re.compile(r"(^|\s)#")


class _EachKeyOnce(yaml.constructor.BaseConstructor):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        if not isinstance(node, yaml.MappingNode):
            return super().construct_mapping(node, deep)  # which says what it is
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != f"{_TAG}merge"]
        if repeated := [key for index, key in enumerate(keys) if key in keys[:index]]:
            raise yaml.constructor.ConstructorError(None, None, f"key {repeated[0]!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


class _Loader(_EachKeyOnce, yaml.SafeLoader):
    pass


class _TextLoader(_EachKeyOnce, yaml.BaseLoader):
    pass


class _Dumper(yaml.SafeDumper):
    """Quotes texts that either version would take for something else."""


_Loader.yaml_implicit_resolvers = {}
for _type, _scalars in _NOT_TEXT.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_TAG + _type, re.compile(_scalars), None)
# PyYAML's own would read a leading zero as octal.
_Loader.add_constructor(f"{_TAG}int", lambda loader, node: int(loader.construct_scalar(node)))  # type: ignore[arg-type]


def text_of(path: Path) -> str:
    """What a YAML file holds.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not UTF-8, or far too large.
    """
    with path.open("rb") as file:
        content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise ValueError(f"it has more than {LARGEST >> 20} MiB")
    return content.decode()


def read(text: str) -> Any:
    """What a YAML document says.

    Raises:
        YAML_ERRORS: it is none, or a key stands twice.
    """
    content = yaml.load(text, _Loader)
    _refuse_circles(content, set(), set())
    return content


def _refuse_circles(value: Any, around: set[int], done: set[int]) -> None:
    """ValueError for what contains itself, which aliases can make."""
    if not isinstance(value, dict | list) or id(value) in done:
        return
    if id(value) in around:
        raise ValueError("an alias stands within what it names")
    inner = value.values() if isinstance(value, dict) else value
    for part in inner:
        _refuse_circles(part, around | {id(value)}, done)
    done.add(id(value))


def read_texts(text: str) -> Any:
    """The same with every scalar as the text that it is: `Yes`, `0` and `true` mean the words."""
    return yaml.load(text, _TextLoader)


def read_value(text: str) -> Any:
    """The value of `KEY=VALUE` on a command line, where nothing is a comment and plain text means itself.

    Raises:
        YAML_ERRORS: it is no value.
    """
    text = text.strip()
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        is_plain = node is None or (isinstance(node, yaml.ScalarNode) and node.style not in ("'", '"'))
        if is_plain and (node.value if node else "") != text:
            return text
        if not is_plain and _COMMENT.search(_QUOTED.sub("", text)):
            raise ValueError("# begins a comment; put a text that holds one in quotes")
        return loader.construct_document(node) if node else None
    finally:
        loader.dispose()


def write(values: Any) -> str:
    """A YAML document in the order of the values' keys."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False)
