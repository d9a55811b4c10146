"""`fedhpc submit`: a run as a batch job."""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from fedhpc.commands.submit.job_file import MARK, job_file
from fedhpc.commands.submit.request import read_request
from fedhpc.config.file import load_config
from fedhpc.errors import ConfigError
from fedhpc.files import write_target
from fedhpc.job.environment import SCHEDULERS
from fedhpc.job.schedulers.base import JobEnvironment


def submit(given: argparse.Namespace, say: Callable[[str], None]) -> int:
    """Write a job file, show it, and submit it as often as asked; the exit status.

    Args:
        given: the command line.
        say: takes what the user is told.

    Raises:
        ConfigError: the scheduler is not here, or does not know what is asked for; or the job file cannot be written.
    """
    config = load_config(given.config, given.set)
    key = choose_scheduler(given.scheduler, must_be_here=not given.dry_run, otherwise="take `none` for this machine")
    request = read_request(given, [config])
    check_asked(key, given)
    path = Path(given.out or f"{config.run_dir}.{key}")
    text = job_file(key, request, Path(given.config), given.set, path)
    write_job_file(path, text)
    say(f"{text}\n{path} is written")
    return 0 if given.dry_run else hand_over(SCHEDULERS[key], path, request.chain, say)


def choose_scheduler(asked: str | None, *, must_be_here: bool, otherwise: str) -> str:
    """The scheduler that is asked for, or the first one found here.

    Args:
        must_be_here: even if it is asked for.
        otherwise: what a user can do without one.

    Raises:
        ConfigError: there is none.
    """
    here = [key for key, scheduler in SCHEDULERS.items() if key != "none" and shutil.which(scheduler.submit_command)]
    if asked is None and here:
        return here[0]
    if asked is not None and (asked in (*here, "none") or not must_be_here):
        return asked
    looked_for = [asked] if asked else [key for key in SCHEDULERS if key != "none"]
    commands = " or ".join(SCHEDULERS[key].submit_command for key in looked_for)
    raise ConfigError(
        f"--scheduler{f' {asked}' if asked else ''}: there is no {commands} on PATH (found here: "
        f"{', '.join(here) or 'no scheduler'}); run it where jobs are submitted, {otherwise}, or only "
        "write the file: --scheduler NAME --dry-run"
    )


def check_asked(key: str, given: argparse.Namespace) -> None:
    """See that the scheduler has what is asked for.

    Raises:
        ConfigError: it has not.
    """
    missing = {
        "flux": {"memory": "Flux shares nodes by cores and GPUs"},
        "none": dict.fromkeys(("memory", "time", "account", "queue"), "without a scheduler nobody limits or counts it"),
    }.get(key, {})
    for option, reason in missing.items():
        if getattr(given, option) is not None:
            raise ConfigError(f"--{option}: {reason}; leave it out")
    if key == "none" and ((given.nodes or 1) > 1 or given.chain > 1):
        raise ConfigError("--nodes and --chain need a scheduler; with `none`, one job runs on this machine")


def write_job_file(path: Path, text: str) -> None:
    """Write it; one that this command has written before is replaced.

    Raises:
        ConfigError: another file is there, or it cannot be written.
    """
    try:
        if path.is_file() and MARK not in "".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[:2]):
            raise ConfigError(f"--out: {path} is there already, and not {MARK} submit` or `fedhpc sweep`; give another")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_target(path, os.fsencode(text))
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"--out: {path} cannot be written: {error}") from None


def hand_over(scheduler: type[JobEnvironment], path: Path, chain: int, say: Callable[[str], None]) -> int:
    """Submit the jobs of a chain, or run the only one here; 0, or the exit status of the command that failed."""
    if scheduler.submit_command == "bash":
        sys.stdout.flush()
        os.execvp("bash", ["bash", str(path)])  # which then gets the signals that are meant for the job
    jobs: list[str] = []
    status = 0
    while len(jobs) < chain and status == 0:
        command = scheduler.submission(jobs)
        status, said = submit_file(scheduler, command if scheduler.file_is_input else [*command, str(path)], path)
        if status == 0:
            jobs.append(scheduler.submitted(said))
        else:
            say(f"{shlex.join(command)} failed with {status}")
    if jobs:
        say(how_to_cancel(scheduler, jobs))
    return status


def submit_file(scheduler: type[JobEnvironment], command: Sequence[str], path: Path) -> tuple[int, str]:
    """Give a scheduler a job file by a command, which names it if it does not read it; exit status, what it said."""
    with path.open(encoding="utf-8") as file:
        done = subprocess.run(
            command,
            stdin=file if scheduler.file_is_input else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
    return done.returncode, done.stdout


def how_to_cancel(scheduler: type[JobEnvironment], jobs: Sequence[str]) -> str:
    """For the user: from the last job to the first, as the next one would start when one is cancelled."""
    return f"submitted; to cancel: {scheduler.cancel_command} {' '.join(map(shlex.quote, reversed(jobs)))}"
