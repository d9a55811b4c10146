"""A run from Python: the same engine as `fedhpc run`, in a script, under mpirun, or in a notebook."""

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fedhpc.config import Config
from fedhpc.job.log import log
from fedhpc.job.run_files import RunFiles


class RunResult:
    """What a run has come to; read from its folder, so that it can be had again later."""

    def __init__(self, run_dir: str | Path, *, finished: bool = True) -> None:
        self.run_dir = Path(run_dir)
        self.finished = finished
        """False where the run was stopped on request; run it again to go on."""

    def __repr__(self) -> str:
        return f"RunResult({str(self.run_dir)!r}, finished={self.finished})"

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, a dictionary for each round.

        Examples:
            >>> [record["round"] for record in result.metrics]
            [0, 1]
        """
        return RunFiles(self.run_dir).read_metrics()

    @property
    def params(self) -> dict[str, np.ndarray]:
        """The tuned tensors, whole, float32, by the names that the tuning gives them; of its newest checkpoint.

        What `fedex_lora` and `flora` have added to the frozen weights [L, out, in] is there as `added.<module>`.

        Raises:
            UserError: the run, its data or its model is not there any more.

        Examples:
            >>> {name: tensor.dtype.name for name, tensor in result.params.items()}
            {'prompts': 'float32'}
        """
        from fedhpc.commands.trained import load_trained

        trained = load_trained(str(self.run_dir), to_use=False)
        return trained.tensors | {f"added.{name}": weight for name, weight in trained.job.tuning.added.items()}

    @property
    def sha256(self) -> str:
        """Digest of `params`; equal for runs that came to the same bits."""
        digest = hashlib.sha256()
        for _, tensor in sorted(self.params.items()):
            digest.update(np.ascontiguousarray(tensor).tobytes())
        return digest.hexdigest()

    def predict(
        self,
        texts: Sequence[str | Mapping[str, Any] | Sequence[Any]],
        *,
        device: int | None = None,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
    ) -> list[dict[str, Any]]:
        """Class and probability of new texts, or answers to them.

        Args:
            texts: a text each; for a task of several fields a sequence in their order, or a mapping by name. For a run
                on conversations the user's message, or a list of messages, each with `role` and `content`.
            device: whose personal parameters are used; None: the global ones.
            max_new_tokens: of an answer, at most; None, as for the next two, what the run's `evaluate` says.
            temperature: 0 takes the likeliest token each time.
            top_p: see docs/configuration.md.

        Returns:
            For each text its `text`, `label`, `probability` and `probabilities` by class; of a run that generates text
            its `text` or `messages`, and `answer`.

        Raises:
            UserError: the run or a text cannot be used.

        Examples:
            >>> sorted(result.predict(["lovely"])[0])
            ['label', 'probabilities', 'probability', 'text']
        """
        from fedhpc.commands.predict import predict_records

        options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
        given = {key: value for key, value in options.items() if value is not None}
        return predict_records(str(self.run_dir), texts, device=device, options=given)

    def export(self, out: str | Path, *, device: int | None = None) -> None:
        """Write the tuned tensors as an adapter that Hugging Face PEFT loads, into a new or empty folder.

        Raises:
            UserError: PEFT has no form for the tuning, or the folder is not empty.
        """
        from fedhpc.commands.export import export_peft

        export_peft(str(self.run_dir), str(out), device=device)


def run(
    config: Config, *, resume: Literal["auto", "never", "require"] = "auto", handle_signals: bool = False
) -> RunResult | None:
    """The whole job: score layers, train, evaluate, checkpoint.

    Alone, this process is the server and all devices. Under mpirun or srun every rank calls `run`: rank 0 is the
    server, the others hold the devices, with the same numbers.

    It raises and never ends the process, but for a fault of a rank under MPI in the middle of the rounds: that ends
    all ranks with MPI_Abort, because the others wait for it. A second run in the same process is fine.

    Args:
        config: of `load_config`.
        resume: `auto` goes on from the run directory's newest valid checkpoint; `never` refuses if there is one;
            `require` refuses to start anew.
        handle_signals: whether SIGUSR1, SIGUSR2 and SIGTERM stop the run with a checkpoint, as they do for
            `fedhpc run`; only the main thread can. Otherwise they do what they did before.

    Returns:
        The result on rank 0 or alone, None on other ranks.

    Raises:
        UserError: something that the configuration names is at fault; on every rank.
        FloatingPointError: the run diverged; the last checkpoint is intact.

    Examples:
        >>> result = fedhpc.run(config)
        >>> result.finished
        True
    """
    from fedhpc.commands import cli
    from fedhpc.exchange import connect
    from fedhpc.exchange.messages import Op
    from fedhpc.job.environment import job_environment
    from fedhpc.job.stopping import StopRequest

    if not isinstance(config, Config):
        raise TypeError(f"fedhpc.run takes what fedhpc.load_config gives, not {type(config).__name__}")
    stop, environment = StopRequest(), job_environment()
    with ExitStack() as held:
        if handle_signals:
            held.enter_context(stop.listening())
        exchange = connect(stop, environment, config.exchange.timeout_s)
        held.enter_context(_own_log())
        held.enter_context(_own_threads())
        role = cli.set_up(lambda: config, resume, exchange, environment, held)
        if exchange.size > 1:
            with cli.faults_end_every_rank(exchange):
                how = role()
        else:
            how = role()
        exchange.leave()
    return RunResult(config.run_dir, finished=how != Op.SUSPEND) if exchange.rank == 0 else None


@contextmanager
def _own_log() -> Iterator[None]:
    """The run's records reach its log.txt; which of them are shown is for the program that runs it to say."""
    handlers, level = list(log.handlers), log.level
    log.setLevel(min(logging.INFO, level or logging.INFO))
    try:
        yield
    finally:
        log.handlers[:] = handlers
        log.setLevel(level)


@contextmanager
def _own_threads() -> Iterator[None]:
    """`device.threads` holds for the run alone."""
    import torch
    from threadpoolctl import threadpool_limits

    before = torch.get_num_threads()
    try:
        with threadpool_limits():
            yield
    finally:
        torch.set_num_threads(before)
