"""Loading mpi4py, and with it the MPI library."""

import socket
from typing import Any

from fedhpc.errors import NoMpiError


def load_mpi(*, start: bool = True) -> Any:
    """mpi4py's module. A process on its own needs none.

    Args:
        start: also start MPI, unless it has been.

    Raises:
        NoMpiError: there is no mpi4py, or no MPI library that it can load.
    """
    try:
        import mpi4py  # noqa: PLC0415

        mpi4py.rc(initialize=False, finalize=True)
        from mpi4py import MPI  # noqa: PLC0415
    except (ImportError, RuntimeError, OSError) as error:
        reason = str(error).removeprefix("cannot load MPI library\n").replace("\n", ", ")
        raise NoMpiError(f"{socket.gethostname()}: mpi4py loads no MPI library: {reason}") from error
    if start and not MPI.Is_initialized():
        MPI.Init_thread()
    return MPI
