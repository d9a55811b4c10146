"""The control groups by which a scheduler or a container limits this process, of version 1 and 2."""

from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")


def control_groups(listing: str) -> Iterator[tuple[str, Path]]:
    """The controllers, none in version 2, and the folder of each group, and of those around it, whose limits hold, too.

    Args:
        listing: a /proc/PID/cgroup.
    """
    for line in listing.splitlines():
        _, controllers, path = line.split(":", 2)
        top = ROOT / controllers.removeprefix("name=")
        group = top / path.lstrip("/")
        yield from ((controllers, folder) for folder in (group, *group.parents) if folder.is_relative_to(top))
