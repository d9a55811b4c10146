"""What a rank does until the job ends, whichever other ranks are lost on the way."""

from fedhpc.device import Worker, serve
from fedhpc.errors import RanksLost
from fedhpc.exchange import Exchange, MpiExchange
from fedhpc.job import Job, load_state
from fedhpc.jobenv import JobEnvironment
from fedhpc.lock import RunLock
from fedhpc.messages import Op
from fedhpc.report import log
from fedhpc.server import Server
from fedhpc.state_file import RunState


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
