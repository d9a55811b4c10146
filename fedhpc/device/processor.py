"""What a rank computes on: a GPU or CPU threads, set so that the same numbers come out every time."""

import os

import torch
from threadpoolctl import threadpool_limits

from fedhpc.errors import UserError
from fedhpc.job.log import log
from fedhpc.job.schedulers.base import JobEnvironment


def limit_threads(count: int) -> None:
    """This process computes with so many CPU threads, in PyTorch and in NumPy's BLAS: sums depend on it."""
    torch.set_num_threads(count)
    threadpool_limits(count)


def choose_torch_device(local_rank: int, environment: JobEnvironment) -> torch.device:
    """A GPU of its own for each rank of a host while there are enough, else the CPU.

    Raises:
        UserError: the job asked for GPUs and has not got them.
    """
    if problem := environment.gpu_problem(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        raise UserError(problem)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if not environment.gpus_allotted:
        log.warning(
            "this job was given no GPU, so the CPU is used; ask for one, for example by sbatch --gpus-per-task=1 "
            "(where SLURM does not manage GPUs, set CUDA_VISIBLE_DEVICES in the job file)"
        )
        return torch.device("cpu")
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    os.environ["FLASH_ATTENTION_DETERMINISTIC"] = "1"
    # As use_deterministic_algorithms, which would load the compiler. A warning alone would leave attention's backward
    # pass as it is, and cuDNN's has no deterministic form.
    torch.set_deterministic_debug_mode("error")
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # with NaN, by one more kernel each
    return torch.device("cuda", environment.gpu_index(local_rank, torch.cuda.device_count()))
