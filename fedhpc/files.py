"""Files that are on disk, not only on their way."""

import os
from pathlib import Path


def fsync(path: Path) -> None:
    """Force a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def names_in(folder: Path) -> list[str]:
    """Of what is in a folder; none where there is no folder.

    Raises:
        OSError: it cannot be listed, which `Path.glob` would take for an empty folder.
    """
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that under its name there is all of it or what was there before.

    Raises:
        OSError: with the file's name, also when the disk is full.
    """
    temporary = path.with_name(path.name + ".partial")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
