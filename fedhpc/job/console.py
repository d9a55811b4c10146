"""How a command speaks and ends: in any encoding, whether or not anybody reads it, with one message for the user."""

import codecs
import io
import json
import os
import select
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from fedhpc.errors import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_USER_ERROR, NoMpiError, UserError, users_fault

ESCAPED = "fedhpc.escaped"
"""What to do with characters that an encoding does not have: write them as JSON does, so that JSON stays JSON."""


def _escape(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


codecs.register_error(ESCAPED, _escape)


class Lasting(io.FileIO):
    """An open file for words that nothing may depend on: what cannot be written is dropped."""

    def __init__(self, stream: TextIO, title: str) -> None:
        super().__init__(stream.fileno(), "w", closefd=False)
        self.stream = stream
        """Keeps the file open: another one would get its number, and the words."""
        self.title = title
        self.problem: OSError | None = None
        """Why something was dropped for the first time."""
        self.on_loss: Callable[[OSError], None] = lambda problem: None
        """Called then."""

    def write(self, data: Any) -> int:
        """Write all of it, or lose it; the number of bytes given."""
        left = memoryview(data).cast("B")
        size = len(left)
        try:
            while left:
                try:
                    left = left[os.write(self.fileno(), left) :]
                except BlockingIOError:  # another program that has this pipe or terminal has made it so
                    select.select((), (self,), ())
        except OSError as error:
            if self.problem is None:
                self.problem = OSError(error.errno, error.strerror, self.title)
                self.on_loss(self.problem)
        return size


@contextmanager
def lasting_output() -> Iterator[None]:
    """Meanwhile, no word on standard output or error can fail, neither for its encoding nor for a lost reader."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _lasting(sys.stdout, "standard output"), _lasting(sys.stderr, "standard error")
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def when_lost(tell: Callable[[OSError], None]) -> None:
    """Have somebody told, once for each, when standard output or error cannot be written."""
    for stream in (sys.stdout, sys.stderr):
        if (file := _file(stream)) is not None:
            file.on_loss = tell


def show(text: str, *, exactly: bool = False) -> None:
    """Print what a command was asked for.

    Args:
        exactly: for a program to read: file names in their own bytes, nothing escaped.

    Raises:
        OSError: it could not be written, all of it.
    """
    if exactly and isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding=sys.getfilesystemencoding(), errors=sys.getfilesystemencodeerrors())
    print(text, flush=True)
    if (file := _file(sys.stdout)) is not None and file.problem is not None:
        raise file.problem


def run_command(command: Callable[[], int], prefix: str = "") -> int:
    """Run a command; its exit status, or a message, and 2 for what is at fault with what the user gave."""
    with lasting_output():
        try:
            return command()
        except BrokenPipeError:  # the reader of a result, `head` for example, has seen enough
            return EXIT_FAILURE
        except KeyboardInterrupt:
            return EXIT_INTERRUPTED
        except (UserError, OSError) as error:
            if (fault := users_fault(error)) is None:
                raise
            print(f"{prefix}error: {fault}", file=sys.stderr)
            return EXIT_USER_ERROR
        except NoMpiError as error:
            print(f"{prefix}error: {error}", file=sys.stderr)
            return EXIT_FAILURE


def _lasting(stream: TextIO | None, title: str) -> TextIO:
    if stream is None:  # closed by whoever started this process
        stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - `Lasting` keeps it
    try:
        stream.flush()
        file = Lasting(stream, title)
    except (OSError, ValueError):  # in memory
        return stream
    return io.TextIOWrapper(file, encoding=stream.encoding, errors=ESCAPED, line_buffering=True)


def _file(stream: TextIO) -> Lasting | None:
    file = getattr(stream, "buffer", None)
    return file if isinstance(file, Lasting) else None
