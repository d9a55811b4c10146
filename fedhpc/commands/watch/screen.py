"""Lines on a terminal, renewed in place, or printed as they are."""

import os
import shutil
import sys
from collections.abc import Sequence

from tqdm.utils import disp_trim

from fedhpc.commands.watch.words import Line
from fedhpc.job.console import ESCAPED, show

CONTROL = "\x1b["
"""Begins what a terminal takes for a command."""


def is_live() -> bool:
    """Whether standard output is a terminal on which a view can be renewed."""
    return sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"


class Screen:
    """What is shown; each view takes the place of the one before."""

    def __init__(self, *, live: bool) -> None:
        self._live = live
        self._colours = live and not os.environ.get("NO_COLOR")
        self._height, self._size = 0, os.terminal_size((0, 0))

    def show(self, lines: Sequence[Line]) -> None:
        """Show these lines; on a terminal as many as it has room for, each cut to its width."""
        if not self._live:
            show("\n".join(plain(line.text) for line in lines))
            return
        size = shutil.get_terminal_size((80, 24))
        if size != self._size:  # the lines of before stand elsewhere now
            clear = f"{CONTROL}H{CONTROL}2J" if self._height else ""
        else:
            clear = f"{CONTROL}{self._height}A{CONTROL}J" if self._height else ""
        room = max(1, size.lines - 1)
        if len(lines) > room:
            lines = [*lines[: room - 1], Line(f"... and {len(lines) - room + 1} more lines: --once shows them")]
        self._height, self._size = len(lines), size
        show(clear + "\n".join(self._painted(line, size.columns) for line in lines))

    def _painted(self, line: Line, columns: int) -> str:
        text = disp_trim(plain(line.text), max(1, columns - 1))
        return f"{CONTROL}{line.colour}m{text}{CONTROL}0m" if self._colours and line.colour else text


def plain(text: str) -> str:
    """What standard output can show, in one line, with nothing in it that a terminal would obey."""
    one = "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
    encoding = sys.stdout.encoding or "utf-8"
    return one.encode(encoding, ESCAPED).decode(encoding)
