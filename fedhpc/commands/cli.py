"""The command line: parse, validate, choose the role by rank."""

import argparse
import hashlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path

from fedhpc.commands.arguments import ANSWERING, make_parser
from fedhpc.config import Config
from fedhpc.config.file import load_config, read_clock
from fedhpc.errors import (
    EXIT_FAILURE,
    EXIT_INTERRUPTED,
    EXIT_STOPPED,
    EXIT_USER_ERROR,
    ConfigError,
    UserError,
    users_fault,
)
from fedhpc.exchange import DEFAULT_TIMEOUT_S, Exchange, LocalExchange, MpiExchange, connect
from fedhpc.exchange.messages import Op
from fedhpc.files import check_target, write_target
from fedhpc.job.console import run_command, show
from fedhpc.job.environment import job_environment
from fedhpc.job.lock import RunLock, check_seen
from fedhpc.job.log import log, log_to_file, start_log
from fedhpc.job.quick_start import quick_start
from fedhpc.job.run_files import RunFiles
from fedhpc.job.schedulers.base import JobEnvironment
from fedhpc.job.stopping import StopRequest
from fedhpc.job.tracker import any_at_work


def main(argv: Sequence[str] | None = None, *, prefix: str = "fedhpc: ") -> int:
    """Run a command; the exit status.

    Args:
        prefix: what messages begin with.
    """

    def command() -> int:
        arguments = parser().parse_args(argv)
        status: int = arguments.action(arguments)
        return status

    return run_command(command, prefix)


def parser() -> argparse.ArgumentParser:
    """That of all commands."""
    actions = {
        "init": init,
        "prepare": prepare,
        "partition": partition,
        "plan": plan,
        "run": run,
        "submit": submit,
        "inspect": inspect,
        "report": report,
        "export": export,
        "predict": predict,
        "sweep": sweep,
        "watch": watch,
        "keys": keys,
        "completion": completion,
        "doctor": doctor,
    }
    return make_parser(actions)


def init(arguments: argparse.Namespace) -> int:
    """`fedhpc init`: files for a user's own data."""
    with quick_start():
        from fedhpc.commands.init import init as write_files

    given = arguments
    print(write_files(given.name, given.data, given.model, given.text, given.label, given.response))
    return 0


def prepare(arguments: argparse.Namespace) -> int:
    """`fedhpc prepare`: a data set, tokenised for one model."""
    with quick_start():
        from fedhpc.data.preparing import Recipe
        from fedhpc.data.preparing import prepare as prepare_data

    recipe = Recipe(**{field.name: getattr(arguments, field.name) for field in fields(Recipe)})
    print(prepare_data(recipe, print, colours=sys.stdout.isatty()))
    return 0


def partition(arguments: argparse.Namespace) -> int:
    """`fedhpc partition`: how devices would share prepared data."""
    from fedhpc.commands.partition import preview

    show("\n".join(preview(arguments)))
    return 0


def run(arguments: argparse.Namespace) -> int:
    """`fedhpc run`: the whole job, in the role of this process's rank."""
    stop, environment = StopRequest(), job_environment()
    stop.listen()
    try:
        timeout_s = load_config(arguments.config, arguments.set).exchange.timeout_s
    except UserError:  # rank 0 will say it
        timeout_s = DEFAULT_TIMEOUT_S
    try:
        exchange = connect(stop, environment, timeout_s)
    except UserError:
        if not environment.is_first_task:
            return EXIT_USER_ERROR
        raise
    start_log(exchange.rank, exchange.size, exchange.host)
    with ExitStack() as held:
        try:
            with faults_end_every_rank(exchange, but_for=UserError), quick_start():
                role = set_up(
                    lambda: load_config(arguments.config, arguments.set), arguments.resume, exchange, environment, held
                )
        except UserError:
            if exchange.rank > 0:  # rank 0 says it
                return EXIT_USER_ERROR
            raise
        with faults_end_every_rank(exchange):
            status = EXIT_STOPPED if role() == Op.SUSPEND else 0
            if exchange.rank == 0 and status == 0:
                environment.mark("FINISHED")
    with faults_end_every_rank(exchange):
        exchange.finalize()
    if isinstance(exchange, MpiExchange) or any_at_work():
        # Without Python's own long way out: nobody is left to notice a rank that hangs there, as in MPI after a repair,
        # or for a tracker.
        os._exit(status)
    return status


def set_up(
    read_config: Callable[[], Config], resume: str, exchange: Exchange, environment: JobEnvironment, held: ExitStack
) -> Callable[[], Op]:
    """Check everything, load what this rank needs; what the rank then does until the job ends.

    Args:
        read_config: gives this rank the run's configuration.
        resume: `auto`, `never` or `require`, as of the command line.
        exchange: the ranks.
        environment: of the batch job.
        held: takes what is to be released at the end, the run directory's lock.

    Raises:
        UserError: on every rank with the same message, whichever rank found the problem.
    """
    from fedhpc.commands.role import follow, lead, make_worker
    from fedhpc.device.processor import limit_threads
    from fedhpc.server import job as jobs
    from fedhpc.server.status_file import StatusFile

    def load() -> jobs.Job:
        config = read_config()
        limit_threads(config.device.threads)
        return jobs.load_job(config)

    is_server = exchange.rank == 0
    with all_ranks_or_none(exchange):
        # Rank 0 checks first and for all: one message instead of one per rank.
        if is_server:
            job = load()
            jobs.check_data(job)
            jobs.check_run_dir(job.config)
            jobs.check_trackers(job.config)
            lock = held.enter_context(RunLock(job.config.run_dir, environment, exchange.progress))
            log_to_file(RunFiles(job.config.run_dir).log, exchange.rank, exchange.size, exchange.host)
            if lock.notice:
                log.warning("%s", lock.notice)
            state = jobs.load_state(job, resume, exchange.progress)
            jobs.log_notices(job, exchange.num_workers)
            stop_before_end(job.config, environment, exchange.stop)
            log.info("this is process %d, %s", os.getpid(), environment.title)
            held.enter_context(StatusFile(job.config, exchange, lock))
    with all_ranks_or_none(exchange) as digests:
        if not is_server:
            job = load()
            log_to_file(RunFiles(job.config.run_dir).log, exchange.rank, exchange.size, exchange.host)
        seen = check_seen(job.config.run_dir, exchange.host)
        digests.append(hashlib.sha256(f"{job.digest} {seen}".encode()).hexdigest())
        if not is_server or isinstance(exchange, LocalExchange):
            worker = make_worker(job, exchange, environment)
    if isinstance(exchange, MpiExchange) and not is_server:
        return partial(follow, exchange, worker)
    if isinstance(exchange, LocalExchange):
        exchange.handler = worker.handle
    return partial(lead, job, exchange, environment, lock, state)


def doctor(arguments: argparse.Namespace) -> int:
    """`fedhpc doctor`: what a site has, and what will not work there."""
    from fedhpc.commands.doctor import doctor as examine

    return examine(arguments.target, arguments.json)


def plan(arguments: argparse.Namespace) -> int:
    """`fedhpc plan`: what a run would need, without training."""
    with quick_start():
        from fedhpc.commands.plan import plan_text

    config = load_config(arguments.config, arguments.set)
    show(plan_text(config, ranks=arguments.ranks, examples_per_second=arguments.examples_per_second))
    return 0


def submit(arguments: argparse.Namespace) -> int:
    """`fedhpc submit`: a run as a batch job."""
    from fedhpc.commands.submit import submit as submit_run

    return submit_run(arguments, show)


def inspect(arguments: argparse.Namespace) -> int:
    """`fedhpc inspect`: a run directory or checkpoint in words."""
    from fedhpc.commands.inspect import inspect_text

    text, valid = inspect_text(arguments.path)
    show(text)
    return 0 if valid else EXIT_USER_ERROR


def report(arguments: argparse.Namespace) -> int:
    """`fedhpc report`: a page about runs, and its tables."""
    clock = read_clock(arguments.set)
    with quick_start():
        from fedhpc.commands.report import read_reference, read_run, write_report

        runs = [read_run(Path(path), clock=clock) for path in dict.fromkeys(map(os.path.realpath, arguments.run_dirs))]
        tasks = (run.task for run in runs)
        reference = read_reference(arguments.reference, tasks) if arguments.reference else None
        write_report(runs, arguments.out, arguments.target, reference=reference)
    endings = (".csv", ".tex", *((".published.csv",) if reference else ()))
    print(f"page: {arguments.out}; tables: {', '.join(str(arguments.out.with_suffix(ending)) for ending in endings)}")
    return 0


def export(arguments: argparse.Namespace) -> int:
    """`fedhpc export`: what a run has tuned, for other tools."""
    with quick_start():
        from fedhpc.commands.export import export_peft

    print(export_peft(arguments.run_dir, arguments.out, device=arguments.device))
    return 0


def predict(arguments: argparse.Namespace) -> int:
    """`fedhpc predict`: class and probability for new text, or an answer."""
    if arguments.out is not None:
        check_out(arguments.out)
    with quick_start():
        from fedhpc.commands.predict import predict_text

    text = predict_text(
        arguments.run_dir,
        texts=arguments.text or (),
        file=arguments.file,
        device=arguments.device,
        all_classes=arguments.all_classes,
        options={key: value for key in ANSWERING if (value := getattr(arguments, key)) is not None},
        streamed=arguments.out is None and sys.stdout.isatty(),
    )
    if arguments.out is not None:
        write_target(Path(arguments.out), text.encode())
    elif text:
        show(text.removesuffix("\n"))
    return 0


def sweep(arguments: argparse.Namespace) -> int:
    """`fedhpc sweep`: the runs of an experiment."""
    from fedhpc.commands.sweep.experiment import load_experiment
    from fedhpc.commands.sweep.job_array import asked_for, task_arguments

    if arguments.submit is None and (asked := asked_for(arguments, "scheduler")):
        raise ConfigError(f"{asked[0]}: goes with --submit; leave it out")
    experiment = load_experiment(arguments.experiment, arguments.set, arguments.out)
    if arguments.cell is not None:
        show(task_arguments(experiment, arguments.cell, arguments.expect), exactly=True)
        return 0
    with quick_start():
        from fedhpc.commands.sweep.local import LocalSweep, check_launch, conclude, failed_cells, find_work, overview
        from fedhpc.commands.sweep.results import check_out
        from fedhpc.commands.sweep.standing import check_run_dirs, waiting

    check_out(experiment)
    check_run_dirs(experiment)
    if arguments.report:
        return conclude(experiment, failed_cells(experiment))
    needed = experiment.needs if waiting(experiment) else ()
    for one in needed:
        check_out(one)
        check_run_dirs(one)
    launches = [arguments.launch if arguments.launch is not None else one.launch for one in (*needed, experiment)]
    for launch in () if arguments.submit is not None else launches:
        check_launch(launch)
    with quick_start():
        work = find_work(experiment, arguments.sources)
    local = LocalSweep(work, launch=arguments.launch, at_once=arguments.jobs, run=main)
    if arguments.submit is not None:
        return local.submit(arguments)
    if arguments.dry_run:
        show(overview(work))
        return 0

    def load_libraries() -> None:
        os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # a look at the GPUs that cells can be forked after
        if None in launches:
            with quick_start():
                from fedhpc.device import worker as device  # noqa: F401
                from fedhpc.server import (
                    job,  # noqa: F401
                    server,  # noqa: F401
                )

    return local.run(load_libraries)


def watch(arguments: argparse.Namespace) -> int:
    """`fedhpc watch`: how a run, or the runs of a sweep, are doing."""
    with quick_start():
        from fedhpc.commands.watch import watch_folder

    watch_folder(arguments.path, every_s=arguments.every, once=arguments.once, as_json=arguments.json)
    return 0


def keys(arguments: argparse.Namespace) -> int:
    """`fedhpc keys`: every key of a configuration."""
    from fedhpc.commands.keys import show_keys

    show(show_keys(arguments.section, arguments.plugins))
    return 0


def completion(arguments: argparse.Namespace) -> int:
    """`fedhpc completion`: a script for a shell."""
    from fedhpc.commands.completion import completion_script

    show(completion_script(parser(), arguments.shell))
    return 0


def stop_before_end(config: Config, environment: JobEnvironment, stop: StopRequest) -> None:
    """Ask for a stop `checkpoint.stop_before_end_s` before the batch job's time limit, if there is one.

    Raises:
        ConfigError: the limit is nearer than that already.
    """
    margin = config.checkpoint.stop_before_end_s
    left = environment.seconds_left() if margin else None
    if left is None:
        return
    if left <= margin:
        raise ConfigError(
            f"checkpoint.stop_before_end_s: {margin:g}, but the job's time limit leaves {left:.0f} s; ask for more "
            "time (fedhpc submit --time, sbatch --time) or set a smaller value"
        )
    stop.ask_in(left - margin)
    log.info("the job's time limit leaves %.0f s; a stop %g s before it is requested by itself", left, margin)


@contextmanager
def all_ranks_or_none(exchange: Exchange) -> Iterator[list[str]]:
    """A part of the set-up that succeeds on all ranks, or raises one UserError on all.

    It may add a digest of what it has read, which must be the same on all.
    """
    problem, digests = None, [""]
    try:
        yield digests
    except (UserError, OSError) as error:
        if (problem := users_fault(error)) is None:
            raise
    exchange.agree(problem, digests[-1])


@contextmanager
def faults_end_every_rank(exchange: Exchange, but_for: type[Exception] | tuple[()] = ()) -> Iterator[None]:
    """Log an exception with rank, host and, unless it is the user's fault, traceback; then end the whole job."""
    try:
        yield
    except but_for:
        raise
    except BaseException as error:
        try:
            is_known = isinstance(error, UserError | KeyboardInterrupt)
            where = "" if is_known else f"\n{traceback.format_exc().rstrip()}"
            log.critical("%s: %s; ending all ranks%s", type(error).__name__, error, where)
            sys.stdout.flush()
            sys.stderr.flush()
        finally:  # even where there is nothing left to log to
            is_users = isinstance(error, FloatingPointError | UserError)
            is_interrupt = isinstance(error, KeyboardInterrupt)
            exchange.abort(EXIT_USER_ERROR if is_users else EXIT_INTERRUPTED if is_interrupt else EXIT_FAILURE)


def check_out(name: str) -> None:
    """Refuse a file that could not be written, before there is anything to write."""
    try:
        check_target(Path(name))
    except OSError as error:
        raise ConfigError(f"--out: {Path(name)} cannot be written: {error.strerror}") from None
