"""The command line: parse, validate, choose the role by rank."""

import argparse
import math
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import fedhpc
from fedhpc.config_file import load_config
from fedhpc.errors import EXIT_STOPPED, EXIT_USER_ERROR, ConfigError, RanksLost, UserError
from fedhpc.exchange import DEFAULT_TIMEOUT_S, Exchange, LocalExchange, MpiExchange, connect
from fedhpc.files import write_whole
from fedhpc.jobenv import JobEnvironment
from fedhpc.lock import RunLock
from fedhpc.messages import Op
from fedhpc.quick_start import quick_start
from fedhpc.report import RunFiles, log, log_to_file, start_log
from fedhpc.stopping import StopRequest

EPILOG = (
    "exit status: 0 done; 2 the configuration, data or checkpoint is at fault; 75 stopped on request with a valid "
    "checkpoint, run again to go on; anything else is a failure"
)
SWEEP_EPILOG = (
    "exit status: 0 all cells are done; 1 some failed, they are listed; 2 the experiment is at fault, nothing was run; "
    "75 stopped on request, run again to go on"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        status: int = arguments.action(arguments)
    except UserError as error:
        print(f"fedhpc: error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except BrokenPipeError:  # the reader of our output, `head` for example, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


def run(arguments: argparse.Namespace) -> int:
    """`fedhpc run`: the whole job, in the role of this process's rank."""
    stop, job = StopRequest(), JobEnvironment()
    stop.listen()
    try:
        timeout_s = load_config(arguments.config, arguments.set).exchange.timeout_s
    except UserError:  # rank 0 will say it
        timeout_s = DEFAULT_TIMEOUT_S
    try:
        exchange = connect(stop, job, timeout_s)
    except UserError:
        if not job.is_first_task:
            return EXIT_USER_ERROR
        raise
    start_log(exchange.rank, exchange.size, exchange.host)
    with ExitStack() as held:
        try:
            with faults_end_every_rank(exchange, but_for=UserError), quick_start():
                role = set_up(arguments, exchange, job, held)
        except UserError:
            if exchange.rank > 0:  # rank 0 says it
                return EXIT_USER_ERROR
            raise
        with faults_end_every_rank(exchange):
            status = EXIT_STOPPED if role() == Op.SUSPEND else 0
            if exchange.rank == 0 and status == 0:
                job.mark_finished()
    with faults_end_every_rank(exchange):
        exchange.part(status)
    return status


def set_up(
    arguments: argparse.Namespace, exchange: Exchange, environment: JobEnvironment, held: ExitStack
) -> Callable[[], Op]:
    """Check everything, load what this rank needs; what the rank then does until the job ends.

    Args:
        held: takes what is to be released at the end, the run directory's lock.

    Raises:
        UserError: on every rank with the same message, whichever rank found the problem.
    """
    from fedhpc import job as jobs
    from fedhpc.device import serve
    from fedhpc.server import Server

    def load() -> jobs.Job:
        config = load_config(arguments.config, arguments.set)
        jobs.limit_threads(config.device.threads)
        return jobs.load_job(config)

    is_server, has_devices = exchange.rank == 0, exchange.rank > 0 or isinstance(exchange, LocalExchange)
    with all_ranks_or_none(exchange):
        # Rank 0 checks first and for all: one message instead of one per rank.
        if is_server:
            job = load()
            jobs.check_data(job)
            jobs.check_run_dir(job.config)
            lock = held.enter_context(RunLock(job.config.run_dir, environment))
            log_to_file(RunFiles(job.config.run_dir).log, exchange.rank, exchange.size, exchange.host)
            if lock.notice:
                log.warning("%s", lock.notice)
            state = jobs.load_state(job, arguments.resume)
            jobs.log_notices(job, exchange.num_workers)
            jobs.stop_before_end(job.config, environment, exchange.stop)
    with all_ranks_or_none(exchange):
        if not is_server:
            job = load()
            log_to_file(RunFiles(job.config.run_dir).log, exchange.rank, exchange.size, exchange.host)
        if has_devices:
            worker = jobs.make_worker(job, exchange, environment)
    if isinstance(exchange, LocalExchange):
        exchange.handler = worker.handle

    def play() -> Op:
        if isinstance(exchange, MpiExchange) and has_devices:
            return serve(exchange, worker)
        return Server(job, exchange, lock).run(state)

    def play_on() -> Op:
        nonlocal state
        while True:
            try:
                return play()
            except RanksLost as loss:
                if job.config.exchange.on_rank_failure == "stop":
                    raise
                exchange.repair()
                if has_devices:
                    worker.start_over()
                    continue
                log.warning("%s; going on from the last checkpoint with %d ranks", loss, exchange.size)
                state = jobs.load_state(job, "auto")

    return play_on


def plan(arguments: argparse.Namespace) -> int:
    """`fedhpc plan`: what a run would need, without training."""
    with quick_start():
        from fedhpc.plan import plan_text

    config = load_config(arguments.config, arguments.set)
    print(plan_text(config, ranks=arguments.ranks, examples_per_second=arguments.examples_per_second))
    return 0


def inspect(arguments: argparse.Namespace) -> int:
    """`fedhpc inspect`: a run directory or checkpoint in words."""
    from fedhpc.inspection import inspect_text

    text, valid = inspect_text(arguments.path)
    print(text)
    return 0 if valid else EXIT_USER_ERROR


def report(arguments: argparse.Namespace) -> int:
    """`fedhpc report`: a page about runs, and its tables."""
    with quick_start():
        from fedhpc.pages import write_report

        write_report(arguments.run_dirs, arguments.out, arguments.target)
    print(f"page: {arguments.out}; tables: {arguments.out.with_suffix('.csv')}, {arguments.out.with_suffix('.tex')}")
    return 0


def export(arguments: argparse.Namespace) -> int:
    """`fedhpc export`: what a run has tuned, for other tools."""
    with quick_start():
        from fedhpc.export import export_peft

    print(export_peft(arguments.run_dir, arguments.out, device=arguments.device))
    return 0


def predict(arguments: argparse.Namespace) -> int:
    """`fedhpc predict`: class and probability for new text."""
    if arguments.out:
        check_target(arguments.out)
    with quick_start():
        from fedhpc.predict import predict_text

    text = predict_text(
        arguments.run_dir,
        texts=arguments.text or (),
        file=arguments.file,
        device=arguments.device,
        all_classes=arguments.all_classes,
    )
    if arguments.out:
        write_whole(Path(arguments.out), text.encode())
    else:
        sys.stdout.write(text)
    return 0


def sweep(arguments: argparse.Namespace) -> int:
    """`fedhpc sweep`: the runs of an experiment."""
    from fedhpc.sweep.experiment import load_experiment
    from fedhpc.sweep.job_array import array_command, submit, task_arguments
    from fedhpc.sweep.local import cell_list, run_here, tables_text
    from fedhpc.sweep.standing import check_run_dirs

    experiment = load_experiment(arguments.experiment, arguments.set, arguments.out)
    if arguments.cell is not None:
        print(task_arguments(experiment, arguments.cell, arguments.expect))
        return 0
    check_run_dirs(experiment)
    if arguments.submit:
        options = [part for text in arguments.set for part in ("--set", text)]
        options += ["--out", arguments.out] if arguments.out else []
        command = array_command(experiment, arguments.experiment, options, arguments.submit, arguments.jobs)
        print(shlex.join(command) if command else "all cells are done", flush=True)
        return 0 if arguments.dry_run or not command else submit(command)
    if arguments.dry_run:
        print(cell_list(experiment))
        return 0
    if arguments.report:
        print(tables_text(experiment))
        return 0

    def load_libraries() -> None:
        with quick_start():
            from fedhpc import device, job, server  # noqa: F401

    return run_here(experiment, launch=arguments.launch, at_once=arguments.jobs or 1, run=main, prepare=load_libraries)


@contextmanager
def all_ranks_or_none(exchange: Exchange) -> Iterator[None]:
    """A part of the set-up that succeeds on all ranks, or raises one UserError on all."""
    problem = None
    try:
        yield
    except UserError as error:
        problem = str(error)
    exchange.agree(problem)


@contextmanager
def faults_end_every_rank(exchange: Exchange, but_for: type[Exception] | tuple[()] = ()) -> Iterator[None]:
    """Log an exception with rank, host and traceback, then end the whole job."""
    try:
        yield
    except but_for:
        raise
    except BaseException as error:
        try:
            log.critical("%s: %s; ending all ranks\n%s", type(error).__name__, error, traceback.format_exc().rstrip())
            sys.stdout.flush()
            sys.stderr.flush()
        finally:  # even where there is nothing left to log to
            exchange.abort()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fedhpc", description="Federated prompt tuning of large language models over MPI.", epilog=EPILOG
    )
    parser.add_argument("--version", action="version", version=f"fedhpc {fedhpc.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    command = commands.add_parser("run", help="select layers, train, evaluate, checkpoint", epilog=EPILOG)
    _add_config(command)
    command.add_argument(
        "--resume",
        choices=("auto", "never", "require"),
        default="auto",
        help="auto (default): go on from the run directory's newest valid checkpoint, if there is one",
    )
    command.set_defaults(action=run)

    command = commands.add_parser("plan", help="what a run would need: bytes, memory, placement; no training")
    _add_config(command)
    command.add_argument(
        "--ranks", type=positive_number, required=True, metavar="R", help="MPI ranks, the server included"
    )
    command.add_argument(
        "--examples-per-second",
        type=positive_rate,
        metavar="X",
        help="training throughput of one rank, to estimate the time",
    )
    command.set_defaults(action=plan)

    command = commands.add_parser("inspect", help="a run directory or a checkpoint in words")
    command.add_argument("path")
    command.set_defaults(action=inspect)

    command = commands.add_parser("report", help="a page about one or more runs, with tables as CSV and LaTeX")
    command.add_argument("run_dirs", metavar="RUN_DIR", nargs="+", type=Path)
    command.add_argument(
        "--out", metavar="FILE.html", type=Path, required=True, help="the page; the tables go beside it"
    )
    command.add_argument(
        "--target",
        type=positive_rate,
        metavar="X",
        help="accuracy to be reached, or what the task has in its place; 95 %% of the task's best unless given",
    )
    command.set_defaults(action=report)

    command = commands.add_parser("export", help="what a run has tuned, as an adapter that Hugging Face PEFT loads")
    _add_trained(command)
    command.add_argument("--format", choices=("peft",), default="peft")
    command.add_argument("--out", required=True, metavar="DIR", help="a new or empty folder")
    command.set_defaults(action=export)

    command = commands.add_parser(
        "predict", help="class and probability for new text", description="Writes one JSON object a text."
    )
    _add_trained(command)
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--text",
        action="append",
        nargs="+",
        metavar="T",
        help="a text; for a task of several fields one for each, in the order of its template; repeatable",
    )
    source.add_argument(
        "--file", metavar="F", help="TSV with a header line (.tsv), JSON lines (.jsonl), or one text a line"
    )
    command.add_argument("--all-classes", action="store_true", help="also the probability of every class")
    command.add_argument("--out", metavar="FILE", help="write there, not to standard output")
    command.set_defaults(action=predict)

    command = commands.add_parser(
        "sweep",
        help="the runs of an experiment: a grid over keys and seeds",
        description="Run every cell of an experiment that is not done, and write its tables. The same command goes on "
        "after an interruption.",
        epilog=SWEEP_EPILOG,
    )
    _add_sweep(command)
    command.set_defaults(action=sweep)
    return parser


def _add_trained(command: argparse.ArgumentParser) -> None:
    command.add_argument("run_dir", metavar="RUN_DIR", help="a run's folder; its newest valid checkpoint counts")
    command.add_argument(
        "--device",
        type=int,
        metavar="ID",
        help="this device's personal parameters; otherwise the global ones, untrained where they are not exchanged",
    )


def _add_sweep(command: argparse.ArgumentParser) -> None:
    command.add_argument("experiment", metavar="EXPERIMENT", type=Path, help="the experiment's YAML file")
    _add_set(command, "override a key of every cell; repeatable")
    command.add_argument("--out", metavar="DIR", help="instead of the file's out:")
    command.add_argument(
        "--launch", metavar="COMMAND", help="what starts a cell's ranks, as 'mpirun -np 3'; one process unless given"
    )
    command.add_argument(
        "--jobs",
        type=positive_number,
        metavar="N",
        help="cells at once (default: 1; of an array as many as SLURM starts)",
    )
    action = command.add_mutually_exclusive_group()
    action.add_argument("--report", action="store_true", help="only write the tables of what is there")
    action.add_argument(
        "--submit",
        nargs="?",
        const="jobs/sweep.slurm",
        metavar="FILE",
        help="submit the cells that are not done as one SLURM array with this job file (default: jobs/sweep.slurm)",
    )
    action.add_argument(
        "--cell", type=int, metavar="N", help="print what `fedhpc run` is given for cell N, a line each"
    )
    command.add_argument("--expect", metavar="DIGEST", help="with --cell: refuse if the experiment's cells are others")
    command.add_argument(
        "--dry-run", action="store_true", help="list the cells and where they stand; with --submit, print the command"
    )


def _add_config(command: argparse.ArgumentParser) -> None:
    command.add_argument("config", metavar="CONFIG", help="the run's YAML file")
    _add_set(command, "override a key of the file; repeatable")


def _add_set(command: argparse.ArgumentParser, words: str) -> None:
    command.add_argument("--set", action="append", default=[], metavar="KEY.SUB=VALUE", help=words)


def check_target(name: str) -> None:
    """Refuse a file that could not be written, before there is anything to write."""
    path = Path(name)
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        found = "is a folder" if path.is_dir() else f"cannot be written: {path.parent} is no folder or not writable"
        raise ConfigError(f"--out: {name} {found}; give a file")


def positive_number(text: str) -> int:
    """An argument that counts something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, found {text!r}")
    return int(text)


def positive_rate(text: str) -> float:
    """An argument that is a number above 0."""
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not 0 < rate < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, found {text!r}")
    return rate
