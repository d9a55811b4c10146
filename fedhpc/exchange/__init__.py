"""The network between server and workers: real MPI ranks, or the serial twin."""

import os

from fedhpc.errors import UserError
from fedhpc.exchange.base import DEFAULT_TIMEOUT_S, LONGEST_GAP_S, Exchange
from fedhpc.exchange.local import LocalExchange
from fedhpc.exchange.mpi import MpiExchange
from fedhpc.exchange.watchdog import time_limit
from fedhpc.job.schedulers.base import JobEnvironment
from fedhpc.job.stopping import StopRequest

SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
LAUNCHER_VARIABLES = (*SIZE_VARIABLES, "PMIX_RANK", "PMI_RANK")
"""Set by mpirun or srun in every process that they start as an MPI rank."""


def connect(stop: StopRequest, environment: JobEnvironment, timeout_s: float) -> Exchange:
    """The network this process was started into: MPI under a launcher, else the serial twin.

    Raises:
        UserError: the processes that were started together do not find each other, or cannot.
    """
    launched_as_rank = any(variable in os.environ for variable in LAUNCHER_VARIABLES)
    if launched_as_rank and (problem := environment.pmi_problem()) and _loads_intel_mpi(timeout_s):
        raise UserError(problem)
    exchange = MpiExchange(stop, timeout_s) if launched_as_rank else LocalExchange(stop, timeout_s)
    if problem := environment.launch_problem(exchange.size, launched_as_rank):
        raise UserError(problem)
    # The first alone: an mpirun inside a step of srun's own MPI hands on that step's variables, too.
    variable = next((name for name in SIZE_VARIABLES if name in os.environ), "")
    if (launched := int(os.environ.get(variable, exchange.size))) != exchange.size:
        raise UserError(
            f"the launcher started {launched} processes ({variable}), but MPI sees {exchange.size}: mpirun and the MPI "
            "library that mpi4py loads are not of the same installation"
        )
    if exchange.rank == 0:
        environment.mark("STARTED")
    return exchange if exchange.size > 1 else LocalExchange(stop, timeout_s)


def _loads_intel_mpi(timeout_s: float) -> bool:
    """Whether mpi4py's MPI library is Intel's. If it is, MPI is not initialized: that could end every rank."""
    import mpi4py  # noqa: PLC0415 - a single process needs no MPI at all

    mpi4py.rc(initialize=False, finalize=True)
    from mpi4py import MPI  # noqa: PLC0415

    if MPI.Get_library_version().startswith("Intel"):
        return True
    with time_limit(timeout_s):
        MPI.Init_thread()
    return False


__all__ = [
    "DEFAULT_TIMEOUT_S",
    "LONGEST_GAP_S",
    "Exchange",
    "LocalExchange",
    "MpiExchange",
    "connect",
]
