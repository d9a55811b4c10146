"""All checks in their order: what rank 0 does, and what the other ranks answer."""

import signal
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from fedhpc.commands.doctor import fabric, gpus, launch, memory, storage, surroundings, versions
from fedhpc.commands.doctor.finding import PROBLEM, WARNING, Finding, by_host, first_of_hosts, rank_words
from fedhpc.commands.doctor.limits import Tell, attempt
from fedhpc.errors import NoMpiError, UserError
from fedhpc.exchange import Survey, start_survey
from fedhpc.job.schedulers.base import JobEnvironment

FACTS_S = 15.0
"""For what a rank says of itself; less than ANSWER_S."""
HERE_S = 60.0
"""For what the first task finds out alone."""
START_S = 60.0
"""For MPI to start, on all hosts."""
EARLIER_S = 5.0
"""So much before rank 0 gives up, the others say that they wait."""
ANSWER_S = 20.0
JOIN_S = 30.0
STORAGE_S = 300.0
SERVE_S = 600.0
IDLE_S = 1.0
CLOCK_S, CLOCK_TRIES = 2.0, 3
Facts = Mapping[int, Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Target:
    """What is examined beside the machines."""

    folder: str = "."
    """The run directory."""
    is_asked_for: bool = False
    """Whether the user has named it."""
    threads: int = 1
    """`device.threads`."""
    dtype: str = "float32"
    """`model.dtype`."""


def examine(environment: JobEnvironment, target: Target, speaks: bool, tell: Tell) -> None:
    """All that one process does.

    Args:
        environment: of the batch job.
        target: the run directory, and what its configuration asks for.
        speaks: whether this process reports.
        tell: takes what is found.
    """
    subjects = _subjects(environment)
    own: dict[str, Any] = {}
    if speaks:
        tell.doing("this host", HERE_S)
        own = _facts(subjects)
        tell.place(ranks=1, hosts={own["host"]: [0]})
        _check_facts({0: own}, {0: own["host"]}, target, tell)
        library = own["launch"].get("library", "")
        tell.found(launch.check_launcher(library, launch.launcher_on_path(), by_srun=environment.is_step))
        tell.found(surroundings.job(environment))
        tell.found([surroundings.hub()])
    tell.doing("the start of MPI", START_S if speaks else START_S - EARLIER_S)
    try:
        survey = start_survey(environment)
    except (UserError, NoMpiError) as error:
        if not speaks and isinstance(error, NoMpiError):  # rank 0 may not know
            raise
        if not speaks:
            tell.end()
            return
        tell.found([Finding(launch.SUBJECT, "ranks", str(error), PROBLEM, "each process would train alone, or none")])
        survey = Survey()
    if survey.rank > 0:
        tell.doing("the answers to rank 0", SERVE_S)
        survey.serve(partial(_answer, subjects, environment, survey))
    else:
        _lead(survey, own, environment, target, tell)
    if survey.silent:
        tell.end()
        signal.pause()  # until the report is written: the launcher ends the job when this process ends
    tell.doing("the end of MPI", ANSWER_S)
    survey.finalize()
    tell.end()


def _subjects(environment: JobEnvironment) -> dict[str, Callable[[], dict[str, Any]]]:
    return {
        "versions": versions.facts,
        "launch": launch.facts,
        "memory": memory.facts,
        "gpus": partial(gpus.facts, environment),
        "surroundings": surroundings.facts,
    }


def _facts(subjects: Mapping[str, Callable[[], dict[str, Any]]]) -> dict[str, Any]:
    """What a rank says of itself, subject by subject; `error` where one takes too long."""
    until = time.monotonic() + FACTS_S
    found = {name: attempt(max(0.1, until - time.monotonic()), look) for name, look in subjects.items()}
    return {**found, "host": socket.gethostname()}


def _answer(
    subjects: Mapping[str, Callable[[], dict[str, Any]]],
    environment: JobEnvironment,
    survey: Survey,
    what: str,
    given: Mapping[str, Any],
) -> Any:
    """Another rank's answer to a question."""
    answers: dict[str, Callable[..., Any]] = {
        "host": socket.gethostname,
        "facts": partial(_facts, subjects),
        "clock": surroundings.now,
        "gpu": partial(_gpu, environment, survey),
        "see": storage.see,
        "lock": storage.lock,
        "write": partial(storage.write, rank=survey.rank),
        "end": lambda: None,
    }
    return attempt(ANSWER_S, partial(answers[what], **given))


def _gpu(environment: JobEnvironment, survey: Survey) -> int:
    return environment.gpu_index(survey.local_rank, len(gpus.visible()["gpus"]))


def _lead(survey: Survey, own: Mapping[str, Any], environment: JobEnvironment, target: Target, tell: Tell) -> None:
    """Rank 0, once the ranks have found each other."""
    tell.doing("what all ranks say of themselves", 2 * ANSWER_S)
    names = {0: own["host"], **survey.ask("host", ANSWER_S)}
    facts = {0: own, **survey.ask("facts", ANSWER_S)}
    hosts = {rank: names[rank] for rank in sorted(facts)}
    tell.place(ranks=survey.size, hosts=dict(by_host(facts)))
    if survey.size > 1:
        _check_facts(facts, hosts, target, tell)
    _meet(survey, hosts, tell)
    tell.doing("GPUs", ANSWER_S)
    indices = {0: _gpu(environment, survey), **survey.ask("gpu", ANSWER_S)}
    seen = {rank: each for rank, each in _of_subject("gpus", facts, hosts).items() if rank in indices}
    tell.found(gpus.check(seen, indices))
    tell.doing("clocks", CLOCK_S * (1 + len(set(hosts.values()))))
    tell.found([surroundings.check_clocks(_clocks(survey, hosts), hosts)])
    tell.doing("the file system of the run directory", STORAGE_S)
    tell.found(storage.examine(target.folder, survey, hosts, is_asked_for=target.is_asked_for))
    if survey.silent:
        said = ", ".join(
            f"rank {rank} on {names.get(rank, 'a host that is not known')} (asked: {what})"
            for rank, what in survey.silent.items()
        )
        advice = "look at that host and process: it hangs, was stopped, or its file system does not answer"
        tell.found([Finding(launch.SUBJECT, "ranks without answer", said, PROBLEM, advice)])
    survey.ask("end", ANSWER_S)


def _meet(survey: Survey, hosts: Mapping[int, str], tell: Tell) -> None:
    """Memory, waiting and messages between ranks."""
    if survey.size == 1:
        return
    num_hosts = len(set(hosts.values()))
    tell.found([Finding(launch.SUBJECT, "ranks", f"{survey.size} find each other, on {num_hosts} host(s)")])
    if not survey.silent:
        tell.doing("the memory that ranks share", JOIN_S + ANSWER_S)
        places = survey.join(JOIN_S)
        tell.found([memory.check_sharing(places, hosts, survey.share_memory(ANSWER_S))])
        tell.doing("waiting", IDLE_S + ANSWER_S)
        time.sleep(IDLE_S)
        if shares := survey.ask("waiting", ANSWER_S):
            tell.found([launch.check_idle(shares)])
    tell.doing("messages", fabric.COLLECT_S + len(set(hosts.values())) + 4 * fabric.SECONDS)
    tell.found(fabric.measure(survey, hosts))


def _check_facts(facts: Facts, hosts: Mapping[int, str], target: Target, tell: Tell) -> None:
    """What follows from the ranks' own words; of a subject on which some are silent, from those of the others."""
    tell.found(versions.check(_of_subject("versions", facts, hosts), target.dtype))
    tell.found(launch.check(_of_subject("launch", facts, hosts), target.threads))
    tell.found(memory.check(_of_subject("memory", facts, hosts)))
    tell.found(surroundings.check(_of_subject("surroundings", facts, hosts)))
    for name in sorted(set(facts[0]) - {"host"}):
        if late := {rank: each[name]["error"] for rank, each in facts.items() if "error" in each[name]}:
            words = f"{rank_words(list(late))}: {next(iter(late.values()))}"
            tell.found([Finding("doctor", name, words, WARNING, "a file system or a driver does not answer there")])


def _of_subject(name: str, facts: Facts, hosts: Mapping[int, str]) -> dict[int, dict[str, Any]]:
    """What the ranks said of one subject, with their hosts; those without an answer are left out."""
    return {rank: {**each[name], "host": hosts[rank]} for rank, each in facts.items() if "error" not in each[name]}


def _clocks(survey: Survey, hosts: Mapping[int, str]) -> dict[int, tuple[float, float]]:
    """Of a rank on each other host: how far its clock is ahead of this one's, and how far that may be wrong."""
    peers = {host: rank for host, rank in first_of_hosts(hosts).items() if host != hosts[0]}
    offsets: dict[int, tuple[float, float]] = {}
    for rank in peers.values():
        for _ in range(CLOCK_TRIES):
            began = time.time()
            for there in survey.ask("clock", CLOCK_S, [rank]).values():
                doubt = (time.time() - began) / 2
                if rank not in offsets or doubt < offsets[rank][1]:
                    offsets[rank] = (there - began - doubt, doubt)
    return offsets
