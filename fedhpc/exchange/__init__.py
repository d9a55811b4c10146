"""The network between server and workers: real MPI ranks, or the serial twin."""

import os

from fedhpc.errors import UserError
from fedhpc.exchange.base import DEFAULT_TIMEOUT_S, LONGEST_GAP_S, Exchange
from fedhpc.exchange.loading import load_mpi
from fedhpc.exchange.local import LocalExchange
from fedhpc.exchange.mpi import MpiExchange
from fedhpc.exchange.survey import Survey
from fedhpc.exchange.watchdog import time_limit
from fedhpc.job.container import container, container_words, is_cut_off, launcher_above
from fedhpc.job.schedulers.base import JobEnvironment
from fedhpc.job.stopping import StopRequest

SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
LAUNCHER_VARIABLES = (*SIZE_VARIABLES, "PMIX_RANK", "PMI_RANK")
"""Set by mpirun or srun in every process that they start as an MPI rank."""
PRRTE, LAUNCHER_FOLDER = "PRTE_LAUNCHED", "PMIX_SERVER_TMPDIR"
"""Set by the mpirun of Open MPI 5."""
TRANSPORTS, NO_SHARED_MEMORY = "OMPI_MCA_btl", "^sm,smcuda,vader"
"""Of Open MPI 5, and 4."""
INTEL = "Intel"


def connect(stop: StopRequest, environment: JobEnvironment, timeout_s: float) -> Exchange:
    """The network this process was started into: MPI under a launcher, else the serial twin.

    Raises:
        UserError: the processes that were started together do not find each other, or cannot.
        NoMpiError: this host has no MPI library that can be loaded.
    """
    launched_as_rank = is_launched()
    if launched_as_rank:
        prepare_mpi()
    if launched_as_rank and (problem := environment.pmi_problem()) and _loads_intel_mpi(timeout_s):
        raise UserError(problem)
    exchange = MpiExchange(stop, timeout_s) if launched_as_rank else LocalExchange(stop, timeout_s)
    if problem := launch_problem(environment, exchange.size):
        raise UserError(problem)
    if exchange.rank == 0:
        environment.mark("STARTED")
    return exchange if exchange.size > 1 else LocalExchange(stop, timeout_s)


def start_survey(environment: JobEnvironment) -> Survey:
    """The ranks of this launch for questions; MPI is started under a launcher only.

    Raises:
        UserError: the processes that were started together do not find each other, or cannot.
        NoMpiError: this host has no MPI library that can be loaded.
    """
    if not is_launched():
        survey = Survey()
    elif (problem := environment.pmi_problem()) and library_version().startswith(INTEL):
        raise UserError(problem)
    else:
        prepare_mpi()
        survey = Survey(load_mpi())
    if problem := launch_problem(environment, survey.size):
        raise UserError(problem)
    return survey


def prepare_mpi() -> None:
    """Before a rank starts MPI: see that it can in a container of this rank alone.

    Open MPI takes shared memory for its own if who made it has the number of this process, as in another container, and
    crashes: `segment_attach` in its opal/mca/shmem/mmap/shmem_mmap_module.c. There ranks talk by TCP.

    Raises:
        UserError: the folder in which Open MPI's launcher leaves files for its ranks cannot be seen.
    """
    folder = os.environ.get(LAUNCHER_FOLDER, "")
    if PRRTE in os.environ and folder and not os.path.isdir(folder):
        raise UserError(
            f"the launcher's folder {folder} ({LAUNCHER_FOLDER}) is not there: the container around this rank has a "
            "/tmp of its own; bind the host's, or start mpirun inside of the container"
        )
    if is_cut_off():
        os.environ.setdefault(TRANSPORTS, NO_SHARED_MEMORY)


def is_launched() -> bool:
    """Whether mpirun or srun has started this process as an MPI rank."""
    return any(variable in os.environ for variable in LAUNCHER_VARIABLES)


def library_version() -> str:
    """What the MPI library that mpi4py loads says that it is; MPI is not started by this.

    Raises:
        NoMpiError: mpi4py or the library cannot be loaded.
    """
    return str(load_mpi(start=False).Get_library_version())


def launch_problem(environment: JobEnvironment, size: int) -> str | None:
    """Why the processes of this launch are not one job, for the user; None if they are.

    Args:
        environment: of the batch job.
        size: processes that MPI sees, 1 without MPI.
    """
    if problem := environment.launch_problem(size, is_launched()):
        return problem + (container_words() if environment.is_step else "")
    # The first alone: an mpirun inside a step of srun's own MPI hands on that step's variables, too.
    variable = next((name for name in SIZE_VARIABLES if name in os.environ), "")
    if (launched := int(os.environ.get(variable, size))) != size:
        return (
            f"the launcher started {launched} processes ({variable}), but MPI sees {size}: mpirun and the MPI "
            f"library that mpi4py loads are not of the same installation{container_words()}"
        )
    if not is_launched() and container() and (launcher := launcher_above()):
        return f"{launcher} has started this process, but MPI finds no variable of a launcher{container_words()}"
    return None


def _loads_intel_mpi(timeout_s: float) -> bool:
    """Whether mpi4py's MPI library is Intel's. If it is, MPI is not initialized: that could end every rank."""
    if library_version().startswith(INTEL):
        return True
    with time_limit(timeout_s):
        load_mpi()
    return False


__all__ = [
    "DEFAULT_TIMEOUT_S",
    "LONGEST_GAP_S",
    "Exchange",
    "LocalExchange",
    "MpiExchange",
    "Survey",
    "connect",
    "is_launched",
    "launch_problem",
    "library_version",
    "start_survey",
]
