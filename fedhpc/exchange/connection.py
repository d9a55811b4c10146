"""What the ranks of one communicator know of each other, and what those of the server's host share."""

import os
import socket
from contextlib import suppress
from typing import Any

import numpy as np

from fedhpc.exchange.memory import ADDRESS, TOKEN, Doorbell, HostMemory, open_doorbell, ring

RANK = np.dtype(
    [
        ("host", "S64"),
        ("process", "<i8"),
        ("doorbell", "<i8", (2,)),
        ("memory", ADDRESS),
        ("token", TOKEN.dtype, TOKEN.shape),
    ]
)
"""What the other ranks must know of a rank; memory and token are the server's."""


class Connection:
    """One rank's to the others; rank 0 is the server, all others are workers."""

    def __init__(self, mpi: Any) -> None:
        """Begin without other ranks, which `join` finds.

        Args:
            mpi: mpi4py's module.
        """
        self._mpi = mpi
        self.doorbell = Doorbell()
        """This rank's own."""

    def join(self, comm: Any) -> None:
        """Connect the ranks of a communicator, all of which must call this."""
        self.comm = comm
        self.rank, self.size = comm.rank, comm.size
        host_comm = comm.Split_type(self._mpi.COMM_TYPE_SHARED)
        self.local_rank, self.ranks_here = host_comm.rank, host_comm.size
        host_comm.Free()
        self.memory = HostMemory(owner=os.getpid())
        """The server's."""
        ranks = np.zeros(self.size, RANK)
        token = self.memory.write_token() if self.rank == 0 else TOKEN.zeros(1)[0]
        own_doorbell = (self.doorbell.file, self.doorbell.inode)
        ranks[self.rank] = (socket.gethostname().encode(), os.getpid(), own_doorbell, self.memory.address[0], token)
        comm.Allgather(self._mpi.IN_PLACE, [ranks, self._mpi.BYTE])
        self.hosts = [name.decode(errors="replace") for name in ranks["host"].tolist()]
        """The host of every rank."""
        self.doorbells = self._find_doorbells(ranks)
        """Rank -> the file by which this rank rings it; of the server and the workers that share its memory."""
        self.shares_memory = 0 in self.doorbells
        """Whether this is a worker that shares the server's memory."""
        self.remote = comm.Split(color=int(self.shares_memory), key=self.rank)
        """Communicator of the server and the workers that do not share its memory."""
        is_remote = self.rank > 0 and not self.shares_memory
        host = 1 + self.hosts.index(self.hosts[self.rank])
        self.remote_here = comm.Split(color=host if is_remote else 0, key=self.rank)
        """Communicator of these workers on one host."""
        self.remote_hosts = comm.Split(color=int(is_remote and self.remote_here.rank == 0), key=self.rank)
        """Communicator of the first of these workers on each host."""
        self.all_ring = len(self.doorbells) == (1 if self.rank else self.size - 1)
        """Whether every rank that this one may wait for rings when it has sent something."""

    def ring(self, peer: int) -> None:
        """Wake a rank, if it shares memory with this one."""
        if peer in self.doorbells:
            ring(self.doorbells[peer])

    def revoke(self) -> None:
        """After the loss of a rank: end what others still wait for, and give up what was shared with it."""
        for comm in (self.comm, self.remote, self.remote_here, self.remote_hosts):
            comm.Revoke()
        self._close()

    def free(self) -> None:
        """All ranks: give up what they share; MPI itself goes on."""
        for comm in (self.remote_hosts, self.remote_here, self.remote, self.comm):
            comm.Free()
        self._close()

    def _close(self) -> None:
        self.memory.close()
        while self.doorbells:
            os.close(self.doorbells.popitem()[1])

    def _find_doorbells(self, ranks: np.ndarray) -> dict[int, int]:
        """The doorbells of the ranks that share the server's memory with this one: the server's, or its workers'."""
        doorbells = {}
        for peer in range(1, self.size) if self.rank == 0 else [0]:
            with suppress(OSError):
                doorbells[peer] = open_doorbell(int(ranks[peer]["process"]), *ranks[peer]["doorbell"].tolist())
        if self.rank:
            self.memory = HostMemory(owner=int(ranks[0]["process"]))
            if not self.memory.try_attach(ranks[0]["memory"][None], ranks[0]["token"]):
                doorbells.clear()
        near = np.zeros(self.size, np.bool_)
        self.comm.Gather([np.array([bool(doorbells)]), self._mpi.BYTE], [near, self._mpi.BYTE], root=0)
        near &= np.isin(np.arange(self.size), list(doorbells))  # at the server, whose word counts
        self.comm.Bcast([near, self._mpi.BYTE], root=0)
        self.near = near[1:]
        """Which of the workers share the server's memory."""
        return {peer: doorbell for peer, doorbell in doorbells.items() if near[peer or self.rank]}
