"""Exceptions that carry a message for the user.

Whatever derives from `UserError` ends the command with its message, no traceback, and exit status 2. So does,
before training, an error of the file system that another start would not mend.
"""

import errno
from collections.abc import Iterable
from difflib import get_close_matches

EXIT_FAILURE = 1
EXIT_USER_ERROR = 2
"""Also of a run that diverged: another one would, too."""
EXIT_STOPPED = 75
"""Stopped on request with a valid checkpoint: EX_TEMPFAIL of sysexits.h, run again to continue."""
EXIT_INTERRUPTED = 130
"""Status of a command ended by Ctrl-C, as shells count it."""
USERS_FAULT = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
)
"""Errors about a file that the user named or owns, which another start would not mend."""
NOT_SUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EXDEV)
"""Errors of a file system that cannot do what it is asked."""


class NoMpiError(Exception):
    """A host's MPI library cannot be loaded: its message, and status 1, since another node may have it."""


class UserError(ValueError):
    """Something the user gave is at fault; the message names it, what was found and what is valid."""


class ConfigError(UserError):
    """A configuration file, an override, or a combination of settings is at fault."""


class DataError(UserError):
    """A source data file or a prepared data set is at fault."""


class ModelError(UserError):
    """A backbone or tokenizer cannot be found, loaded or used."""


class CheckpointError(UserError):
    """A checkpoint or run directory is at fault."""


class ReportError(UserError):
    """A report cannot be written as asked."""


class Halt(Exception):  # noqa: N818 - not an error
    """A stop was requested: what is under way ends here, kept for the checkpoint."""


class RanksLost(Exception):  # noqa: N818 - a fault of the machine, named for what happened
    """A rank does not answer any more."""


def users_fault(error: UserError | OSError) -> str | None:
    """What to tell the user who is at fault; None if it is the machine that is."""
    if isinstance(error, UserError):
        return str(error)
    if error.errno not in USERS_FAULT:
        return None
    return str(error) if error.filename is None else f"{error.filename}: {error.strerror}"


def first_line(error: BaseException) -> str:
    """What an exception says, in short."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """What to add to a message about a name that is none of the valid ones: the nearest of them, if one is near."""
    near = get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""
