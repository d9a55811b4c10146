"""How fast rank 0 and each host exchange messages: a table, made in about five seconds."""

from collections.abc import Iterator, Mapping

from fedhpc.commands.doctor.finding import OK, PROBLEM, WARNING, Finding, first_of_hosts
from fedhpc.exchange import Survey

SUBJECT = "network"
SECONDS, MOST_EACH_S, LEAST_EACH_S = 4.0, 1.0, 0.15
"""For all hosts together, and for one of them."""
MESSAGE_BYTES = 4 << 20
COLLECT_S = 30.0
SLOW_BYTES, SLOW_S = 200e6, 2e-3
"""Below 200 MB/s, a gigabit link or a wrong interface; a fast fabric takes some microseconds."""


def measure(survey: Survey, hosts: Mapping[int, str]) -> Iterator[Finding]:
    """Rank 0: a line for each host, that of rank 0 included if others are there, and one for all ranks together.

    Args:
        survey: the ranks.
        hosts: of each rank that answers.
    """
    peers = first_of_hosts(hosts)
    each = max(LEAST_EACH_S, min(MOST_EACH_S, SECONDS / max(1, len(peers))))
    for host, rank in peers.items():
        try:
            yield line(host, rank, survey.measure(rank, each, MESSAGE_BYTES), is_near=host == hosts[0])
        except TimeoutError:
            survey.silent[rank] = "messages of 4 MiB"
            advice = (
                "small messages arrive and large ones do not: choose the interface, for Open MPI "
                "OMPI_MCA_btl_tcp_if_include=eth0, for MPICH and Intel MPI FI_PROVIDER=tcp"
            )
            yield Finding(SUBJECT, f"to {host}", f"rank {rank}: a message of 4 MiB does not arrive", PROBLEM, advice)
            return
    if len(survey.answering) < survey.size - 1:
        return
    try:
        found = survey.collect(MESSAGE_BYTES, COLLECT_S)
    except TimeoutError:
        advice = "messages between two ranks arrive, those of all do not: tell the administrators, with this report"
        yield Finding(SUBJECT, "broadcast and gather", "come to no end", PROBLEM, advice)
        return
    value = (
        f"{found['nbytes'] / 1e6:.1f} MB to all in {1e3 * found['broadcast_s']:.0f} ms, "
        f"as much from each in {1e3 * found['gather_s']:.0f} ms"
    )
    yield Finding(SUBJECT, "broadcast and gather", value)


def line(host: str, rank: int, found: Mapping[str, float], *, is_near: bool) -> Finding:
    """A host's line of the table.

    Args:
        host: its name.
        rank: which of its ranks was the peer.
        found: `latency_s`, `down` and `up`, see `Survey.measure`.
        is_near: whether it is rank 0's own.
    """
    value = (
        f"{1e6 * found['latency_s']:7.1f} us   down {found['down'] / 1e6:7.0f} MB/s   "
        f"up {found['up'] / 1e6:7.0f} MB/s   (rank {rank})"
    )
    if found["latency_s"] < SLOW_S and min(found["down"], found["up"]) >= SLOW_BYTES:
        return Finding(SUBJECT, f"to {host}", value, OK)
    advice = (
        "busy cores, or more ranks than cores"
        if is_near
        else "a slow link, or not the fast one: ask the site how its MPI chooses the network"
    )
    return Finding(SUBJECT, f"to {host}", value, WARNING, advice)
