"""Files that are on disk, not only on their way, and whether they can be written."""

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PARTIAL = ".partial"


def fsync(path: Path) -> None:
    """Force a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def names_in(folder: Path) -> list[str]:
    """The names of what is in a folder; none where there is no folder.

    Raises:
        OSError: it cannot be listed, which `Path.glob` would take for an empty folder.
    """
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError of the body names this file, also when the disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


def write_whole(path: Path, data: bytes, *, lasting: bool = True) -> None:
    """Write a file so that under its name there is all of it or what was there before.

    Args:
        lasting: force it to disk, so that this holds after a failure of the machine, too.

    Raises:
        OSError: with the file's name, also when the disk is full.
    """
    temporary = path.with_name(path.name + PARTIAL)
    with naming(path):
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                if lasting:
                    os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError:
            with suppress(OSError):
                temporary.unlink()
            raise


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new directory that takes the place of ``path`` once the block has ended without an error."""
    path = Path(os.path.realpath(path))
    new, old = (path.parent / f".{path.name}.{os.getpid()}.{role}" for role in ("new", "old"))
    new.mkdir(parents=True)
    try:
        yield new
        fsync(new)
        if path.exists():
            path.rename(old)
        new.rename(path)
        fsync(path.parent)
    except BaseException:
        if old.exists() and not path.exists():
            old.rename(path)
        raise
    finally:
        for leftover in (new, old):
            shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Meanwhile nobody else holds the folder, where its file system has locks; waits for whoever does."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def write_target(path: Path, data: bytes) -> None:
    """Write a file that the user named, whole; what is no plain file, `/dev/stdout` for example, is not replaced.

    Raises:
        OSError: with the file's name, also when the disk is full.
    """
    if _takes_a_stream(path):
        with naming(path), path.open("wb") as file:
            file.write(data)
    else:
        write_whole(Path(os.path.realpath(path)), data)


def check_target(path: Path) -> None:
    """See that `write_target` can write a file.

    Raises:
        OSError: it cannot.
    """
    if path.is_dir():
        raise _error(errno.EISDIR, path)
    if _takes_a_stream(path):
        return
    path = Path(os.path.realpath(path))
    if not path.parent.exists():
        raise OSError(errno.ENOENT, f"there is no folder {path.parent}", str(path))
    check_folder(path.parent)
    _check_names(path.with_name(path.name + PARTIAL), path.parent)


def _takes_a_stream(path: Path) -> bool:
    """Whether this is a device or a pipe."""
    return path.exists() and not path.is_file()


def check_folder(path: Path) -> None:
    """See that a folder can be made, or is there, and that files can be written in it.

    Raises:
        OSError: it cannot, or they cannot.
    """
    folders = (path, *Path(os.path.realpath(path)).parents)
    existing = next(folder for folder in folders if folder.exists() or folder.is_symlink())
    _check_names(path, existing)
    with naming(existing), tempfile.TemporaryFile(dir=existing):
        pass


def check_replaces(folder: Path) -> None:
    """See that files and folders in a folder can be forced to disk and take their names, as checkpoints have to.

    Raises:
        OSError: they cannot, or something else is under the name then.
    """
    with tempfile.TemporaryDirectory(prefix=".check-", dir=folder) as place:
        part, whole = Path(place, "part"), Path(place, "whole")
        part.mkdir()
        for data in (b"old", b"new"):
            write_whole(part / "file", data)
        part.rename(whole)
        fsync(whole)
        if (whole / "file").read_bytes() != b"new":
            raise _error(errno.ENOTSUP, whole / "file")


def _check_names(path: Path, existing: Path) -> None:
    """A file system says that a name is too long only once the folder is there that it is to be in."""
    if max(len(os.fsencode(part)) for part in ("", *path.parts)) > os.pathconf(existing, "PC_NAME_MAX"):
        raise _error(errno.ENAMETOOLONG, path)


def _error(code: int, path: Path) -> OSError:
    return OSError(code, os.strerror(code), str(path))
