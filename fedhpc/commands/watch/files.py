"""Files of run directories as somebody sees them who looks again and again."""

import os
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
Stamp = tuple[int, int, int]


class Files:
    """Reads a file again only when it has changed, and tells ages by one clock where it can.

    An age is how long ago this process saw the file change; unless it has, the time of this machine's clock since the
    file's own time, which on a network file system is of another clock.
    """

    def __init__(self) -> None:
        self.problems: dict[Path, str] = {}
        """Files that are there and could not be read, and why."""
        self._read: dict[Path, tuple[Stamp, Any]] = {}
        self._seen: dict[Path, tuple[Stamp, float | None]] = {}
        """What a file was when it was last looked at, and when it was seen to change since the first look."""

    def read(self, path: Path, parse: Callable[[bytes], T], otherwise: T) -> T:
        """What `parse`, for a file always the same, makes of it; `otherwise` where none can be read."""
        self.problems.pop(path, None)
        try:
            found = path.stat()
            if not stat.S_ISREG(found.st_mode):
                raise OSError(0, "is not a plain file")
            stamp = _stamp(found)
            before = self._read.get(path)
            if before is None or before[0] != stamp:
                before = stamp, parse(path.read_bytes())
                self._read[path] = before
        except (FileNotFoundError, NotADirectoryError):
            return otherwise
        except OSError as error:
            self.problems[path] = str(error.strerror)
            return otherwise
        parsed: T = before[1]
        return parsed

    def age(self, path: Path) -> float | None:
        """Seconds since a file was written; None without one."""
        try:
            found = path.stat()
        except OSError:
            return None
        stamp, now = _stamp(found), time.monotonic()
        before, changed = self._seen.get(path, (stamp, None))
        if before != stamp:
            changed = now
        self._seen[path] = stamp, changed
        return max(0.0, time.time() - found.st_mtime) if changed is None else now - changed


def _stamp(found: os.stat_result) -> Stamp:
    return found.st_mtime_ns, found.st_size, found.st_ino
