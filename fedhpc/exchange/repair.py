"""Going on after the loss of ranks, by ULFM (User-Level Failure Mitigation): revoke, and shrink to those that are left.

Bland, Bouteiller, Herault, Bosilca, Dongarra, Post-failure recovery of MPI communication capability, International
Journal of High Performance Computing Applications, 2013. Open MPI has it since version 5.
"""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from typing import Any

import numpy as np

from fedhpc.errors import RanksLost
from fedhpc.exchange.connection import Connection
from fedhpc.exchange.watchdog import ULFM


def repair(
    connection: Connection, join: Callable[[Any], None], inside: Callable[[str], AbstractContextManager[None]]
) -> None:
    """Connect the ranks that are left, under new numbers.

    Args:
        connection: that of all ranks.
        join: connects the ranks of a new communicator, by the same connection.
        inside: a context in which MPI's errors about lost ranks are raised as RanksLost; takes words on what happens.

    Raises:
        RanksLost: the server is lost, no worker is left, or the MPI cannot do it.
    """
    if ULFM not in os.environ:
        raise RanksLost("exchange.on_rank_failure: continue needs an MPI with ULFM: mpirun --with-ft ulfm")
    if _join_survivors(connection, join, inside) != 0:
        raise RanksLost("rank 0, the server, is lost")
    if connection.size == 1:
        raise RanksLost("no rank with devices is left")


def _join_survivors(
    connection: Connection, join: Callable[[Any], None], inside: Callable[[str], AbstractContextManager[None]]
) -> int:
    """Connect the ranks that are left; the number that the new rank 0 had."""
    old_rank = np.array([connection.rank], np.int64)
    for _ in range(connection.size):
        with suppress(RanksLost), inside("the repair after a loss"):  # another one may be lost meanwhile
            connection.revoke()
            join(connection.comm.Shrink())
            first = old_rank.copy()
            connection.comm.Bcast(first, root=0)
            return int(first[0])
    raise RanksLost("the ranks that are left do not find together")
