"""What a job asks its scheduler for, as read from the command line."""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass

from fedhpc.config import Config
from fedhpc.errors import ConfigError

LONGEST_S = 365 * 86400
TIME = re.compile(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)")
UNITS = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m(?:in)?)?(?:(\d+)s)?")
WORD = re.compile(r"[\w.@:+/-]+")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked for."""

    nodes: int
    ranks: int
    """In all, the server included."""
    cpus: int
    """Of each rank."""
    gpus: int
    """Of each node."""
    memory_gb: int | None
    """Of each node, in GB; None leaves it to the scheduler."""
    seconds: int | None
    """Time limit; None leaves it to the scheduler."""
    account: str | None
    queue: str | None
    chain: int
    """So many jobs, each going on where the one before stopped."""

    @property
    def ranks_per_node(self) -> int:
        """At most."""
        return -(-self.ranks // self.nodes)

    @property
    def cpus_per_node(self) -> int:
        """For as many ranks as a node may get."""
        return self.ranks_per_node * self.cpus

    @property
    def minutes(self) -> int | None:
        """Time limit in whole minutes."""
        return None if self.seconds is None else -(-self.seconds // 60)

    @property
    def clock(self) -> str | None:
        """Time limit as HH:MM:SS, of any number of hours."""
        if self.seconds is None:
            return None
        minutes, seconds = divmod(self.seconds, 60)
        return f"{minutes // 60:02}:{minutes % 60:02}:{seconds:02}"


def read_request(given: argparse.Namespace, configs: Sequence[Config]) -> Request:
    """What the command line asks for; what it leaves out follows from the run, or the largest of several.

    Raises:
        ConfigError: it contradicts itself, or a run.
    """
    nodes, each = given.nodes or 1, given.ranks_per_node
    devices = max(config.federation.devices_per_round for config in configs)
    ranks = given.ranks or (nodes * each if each else 1 + devices)
    if each and ranks > nodes * each:
        raise ConfigError(
            f"--ranks {ranks}: {nodes} nodes with {each} ranks each (--ranks-per-node) have room for {nodes * each}"
        )
    if ranks < nodes:
        raise ConfigError(f"--nodes {nodes}: {ranks} ranks leave nodes without any; ask for {ranks} nodes at most")
    margin = max(config.checkpoint.stop_before_end_s for config in configs)
    if given.time is not None and given.time <= margin:
        raise ConfigError(
            f"--time: {given.time} s, but the run stops {margin:g} s before the end (checkpoint.stop_before_end_s); "
            "ask for more"
        )
    return Request(
        nodes=nodes,
        ranks=ranks,
        cpus=given.cpus_per_task or max(config.device.threads for config in configs),
        gpus=given.gpus_per_node or 0,
        memory_gb=given.memory,
        seconds=given.time,
        account=given.account,
        queue=given.queue,
        chain=given.chain,
    )


def duration(text: str) -> int:
    """Seconds; an argument such as 24:00:00, 2-12:00:00 or 1d12h30m."""
    found = TIME.fullmatch(text) or (UNITS.fullmatch(text) if text else None)
    if found is None:
        raise argparse.ArgumentTypeError(
            f"must be HOURS:MINUTES:SECONDS, DAYS-HOURS:MINUTES:SECONDS, or with units as 1d12h30m, found {text!r}"
        )
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if not 0 < total <= LONGEST_S:
        raise argparse.ArgumentTypeError(f"must be more than nothing and at most 365 days, found {text!r}")
    return total


def gigabytes(text: str) -> int:
    """An argument such as 64G or 1T, in GB."""
    found = re.fullmatch(r"([1-9]\d{0,5})(G|T)B?", text, re.IGNORECASE)
    if found is None:
        raise argparse.ArgumentTypeError(f"must be whole gigabytes or terabytes, as 64G or 1T, found {text!r}")
    return int(found[1]) * (1024 if found[2] in "tT" else 1)


def word(text: str) -> str:
    """An argument that names something of the scheduler's."""
    if not WORD.fullmatch(text):
        raise argparse.ArgumentTypeError(f"must be one word of letters, digits and . @ : + / _ -, found {text!r}")
    return text
