"""`fedhpc doctor`: what a site has, and what will not work there.

The process that was started only reports; a child examines, see `fedhpc.commands.doctor.limits`. Under a launcher, rank
0 asks the other ranks one question after the other. Where they do not find each other, the first task reports alone.
"""

import json
import os
import socket
import sys
import time
from collections.abc import Mapping
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import fedhpc
from fedhpc.commands.doctor.examination import EARLIER_S, Target, examine
from fedhpc.commands.doctor.finding import PROBLEM, WARNING, Finding, Report, rank_words
from fedhpc.commands.doctor.limits import TERMINATED, supervise
from fedhpc.config.file import load_config
from fedhpc.errors import EXIT_FAILURE, ConfigError
from fedhpc.files import check_target, write_target
from fedhpc.job.console import show
from fedhpc.job.environment import job_environment

CONFIG_ENDINGS = (".yaml", ".yml")


def doctor(target: str | None, json_file: Path | None) -> int:
    """Examine, and print the report; 1 if there are problems.

    Args:
        target: a run directory, which need not be there yet, or a configuration; None: the current folder.
        json_file: where to write the report for programs.

    Raises:
        UserError: the configuration is at fault, or the file cannot be written.
    """
    environment = job_environment()
    speaks = environment.is_first_task
    place: dict[str, Any] = {"ranks": 1, "hosts": {}}
    report = Report()

    def take(message: dict[str, Any]) -> None:
        if "finding" in message:
            report.add(Finding(**message["finding"]))
        place.update(message.get("place", {}))

    aim = Target()
    if speaks:
        aim = _target(target)
        if json_file is not None:
            _check_json(json_file)
    with supervise(partial(examine, environment, aim, speaks), take) as problem:
        if not speaks:
            return 0 if problem is None or TERMINATED in problem else _say_aside(problem)
        if problem is not None:
            report.add(Finding("doctor", "not all was examined", problem, PROBLEM, _advice(problem)))
        show(report.text(_title(place, aim)))
        if json_file is not None:
            write_target(json_file, json.dumps(_as_json(report, place, aim), indent=2).encode() + b"\n")
    return EXIT_FAILURE if report.count(PROBLEM) else 0


def _target(target: str | None) -> Target:
    if target is None:
        return Target()
    path = Path(target)
    if path.suffix in CONFIG_ENDINGS or path.is_file():
        config = load_config(target, [])
        return Target(folder=config.run_dir, is_asked_for=True, threads=config.device.threads, dtype=config.model.dtype)
    return Target(folder=target, is_asked_for=True)


def _check_json(path: Path) -> None:
    try:
        check_target(path)
    except OSError as error:
        raise ConfigError(f"--json: {path} cannot be written: {error.strerror}") from None


def _title(place: Mapping[str, Any], target: Target) -> str:
    hosts = [f"{host}: {rank_words(ranks)}" for host, ranks in place["hosts"].items()]
    ranks = f"{place['ranks']} rank{'' if place['ranks'] == 1 else 's'}"
    return "\n".join([f"fedhpc {fedhpc.__version__} doctor, {ranks}, run directory {target.folder}", *hosts])


def _say_aside(problem: str) -> int:
    """Another rank's words, if rank 0 cannot know them; only later its status, with which the launcher ends the job."""
    rank = next((os.environ[name] for name in ("PMIX_RANK", "PMI_RANK") if name in os.environ), "")
    who = f"rank {rank}" if rank else f"process {os.getpid()}"
    sys.stderr.write(f"fedhpc doctor: {who} on {socket.gethostname()}: {problem}\n")
    sys.stderr.flush()
    time.sleep(EARLIER_S + 1)
    return EXIT_FAILURE


def _as_json(report: Report, place: Mapping[str, Any], target: Target) -> dict[str, Any]:
    return {
        "fedhpc": fedhpc.__version__,
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "run_dir": target.folder,
        **place,
        "problems": report.count(PROBLEM),
        "warnings": report.count(WARNING),
        "findings": report.as_json(),
    }


def _advice(problem: str) -> str:
    if problem.startswith("the start of MPI"):
        return (
            "what the MPI said stands before this report; a rank that has not started holds all others up: ranks that "
            "wait for it say so. A full /dev/shm or /tmp, or a launcher of another MPI, end processes here"
        )
    if TERMINATED in problem:
        return "it was told to end; what else was found stands above"
    return "this hangs or crashes here; what else was found stands above"
