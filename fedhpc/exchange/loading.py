"""Loading mpi4py, and with it the MPI library."""

from typing import Any

from fedhpc.errors import UserError


def load_mpi(*, start: bool = True) -> Any:
    """mpi4py's module. A process on its own needs none.

    Args:
        start: initialize MPI, if this is the first call in this process; else `MPI.Init_thread` does so.

    Raises:
        UserError: there is no mpi4py, or no MPI library that it can load.
    """
    try:
        import mpi4py  # noqa: PLC0415

        if not start:
            mpi4py.rc(initialize=False, finalize=True)
        from mpi4py import MPI  # noqa: PLC0415
    except (ImportError, RuntimeError, OSError) as error:
        reason = str(error).replace("\n", ", ")
        raise UserError(
            f"mpi4py loads no MPI library: {reason}; load the module of the MPI whose mpirun starts the ranks, or "
            "give its libmpi.so in MPI4PY_LIBMPI"
        ) from error
    return MPI
