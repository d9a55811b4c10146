"""`fedhpc completion`: a script that has a shell complete commands, options and their values."""

import argparse
from collections.abc import Iterator
from pathlib import Path

import shtab


def completion_script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The script; it completes choices where there are some, and files where an argument is any text."""
    for action in _arguments(parser):
        if action.choices is None and action.nargs != 0 and action.type in (None, Path):
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    return shtab.complete(parser, shell)


def _arguments(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _arguments(command)
        else:
            yield action
