"""What a rank does until the job ends, whichever other ranks are lost on the way."""

import os

from fedhpc.checkpoint.state_file import RunState
from fedhpc.device.processor import choose_torch_device
from fedhpc.device.worker import Worker, serve
from fedhpc.errors import RanksLost
from fedhpc.exchange import Exchange, MpiExchange
from fedhpc.exchange.messages import Op
from fedhpc.job.lock import RunLock
from fedhpc.job.log import log
from fedhpc.job.schedulers.base import JobEnvironment
from fedhpc.model.backbone import Backbone
from fedhpc.server.job import Job, load_state
from fedhpc.server.server import Server

KERNELS_KEPT = 32


def make_worker(job: Job, exchange: Exchange, environment: JobEnvironment) -> Worker:
    """Load the backbone and set up one rank's devices."""
    # In 16 bits and with prepacked weights, oneDNN keeps a compiled kernel of about 0.7 MB for every shape that it met,
    # 1024 of them by default; a step takes some ten.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KERNELS_KEPT))
    torch_device = choose_torch_device(exchange.local_rank, environment)
    backbone = Backbone(job.config.model, job.config.tuning, job.data.description, torch_device)
    job.tuning.check_on(backbone)
    return Worker(job.config, job.data, job.partition, backbone, job.tuning, exchange)


def follow(exchange: MpiExchange, worker: Worker) -> Op:
    """A device rank, until the server says how to end.

    Raises:
        RanksLost: the run is to stop then, or cannot go on.
    """
    while True:
        try:
            return serve(exchange, worker)
        except RanksLost:
            if worker.config.exchange.on_rank_failure == "stop":
                raise
            worker.writing.finish()  # its notes belong to the ranks as they were
            exchange.repair()
            worker.start_over()


def lead(job: Job, exchange: Exchange, environment: JobEnvironment, lock: RunLock, state: RunState | None) -> Op:
    """The server's rank, from a state or from the start; after a loss from the last checkpoint.

    Raises:
        RanksLost: the run is to stop then, or cannot go on.
    """
    while True:
        server = Server(job, exchange, lock)
        try:
            how = server.run(state)
        except RanksLost as loss:
            if job.config.exchange.on_rank_failure == "stop":
                raise
            exchange.repair()
            log.warning("%s; going on from the last checkpoint with %d ranks", loss, exchange.size)
            state = load_state(job, "auto")
            continue
        if how == Op.SUSPEND and server.has_trained:
            environment.mark("TRAINED")
        return how
