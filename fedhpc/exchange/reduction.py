"""How the sums of all workers' uploads reach the server."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedhpc.exchange.connection import Connection
from fedhpc.exchange.exact_sum import Terms
from fedhpc.exchange.messages import RecordType, Tag
from fedhpc.exchange.shared_layout import SharedLayout
from fedhpc.exchange.transfer import Types


class Reduction:
    """One rank's end."""

    def __init__(
        self,
        mpi: Any,
        connection: Connection,
        layout: SharedLayout,
        types: Types,
        wait_until: Callable[..., None],
    ) -> None:
        """Begin with nothing to add up.

        Args:
            mpi: mpi4py's module.
            connection: to the other ranks.
            layout: of what workers of the server's host share with it.
            types: of messages.
            wait_until: how to wait for something during a transfer, if need be `with_doorbell`.
        """
        self._mpi, self._connection, self._layout, self._types = mpi, connection, layout, types
        self._wait_until = wait_until
        self._arriving: NDArray[np.int64] = np.empty((0, 0), np.int64)

    def send(self, records: np.ndarray, terms: Terms, exponent: int) -> None:
        """Worker: write a share of the sums in the server's memory; remote workers reduce theirs to one, which is sent.

        They do so within each host first: less passes between hosts, however ranks are placed. Nobody writes a share of
        masked sums, for which the uploads would have to be in that memory; each worker sends its own.
        """
        connection = self._connection
        if connection.shares_memory and terms.of.masked:
            if len(records):
                self._send(terms.fixed(exponent), connection.comm)
            return
        if connection.shares_memory:
            self._layout.add_up(connection.rank - 1, RecordType.of(records), terms.of, exponent)
            self._wait(connection.comm.Isend([np.zeros(1, np.uint8), self._mpi.BYTE], dest=0, tag=Tag.SUMS))
            connection.ring(0)
            return
        part = terms.fixed(exponent)  # by a name: a request that is not root's does not keep it
        for comm in (connection.remote_here, connection.remote_hosts):
            source, target = (part, None) if comm.rank else (self._mpi.IN_PLACE, part)
            self._wait(comm.Ireduce(source, target, self._mpi.SUM, root=0))
            if comm.rank:
                return
        self._send(part, connection.remote)

    def take(self, sums: NDArray[np.int64], counts: Sequence[int], *, masked: bool) -> int:
        """Server: wait until the workers of this host have written the sums of theirs, and add those that are sent.

        Args:
            sums: [k, n], of the workers of this host; afterwards of all.
            counts: uploads of each worker.
            masked: whether those of this host send theirs, too.

        Returns:
            How many sums have crossed ranks, those that were written counted as one.
        """
        connection = self._connection
        sources = [(connection.remote, 1)] if connection.remote.size > 1 else []
        if masked:
            sources += [(connection.comm, peer) for peer in connection.doorbells if counts[peer - 1]]
        else:
            pending = [
                connection.comm.Irecv([np.zeros(1, np.uint8), self._mpi.BYTE], source=peer, tag=Tag.SUMS)
                for peer in connection.doorbells
            ]
            self._wait_until(lambda: self._mpi.Request.Testall(pending), with_doorbell=True)
        if sources and self._arriving.shape != sums.shape:
            self._arriving = np.empty_like(sums)
        for comm, source in sources:
            self._wait(comm.Irecv(self._message(self._arriving), source=source, tag=Tag.SUMS))
            sums += self._arriving
        return len(sources) if masked else 1

    def _send(self, part: NDArray[np.int64], comm: Any) -> None:
        self._wait(comm.Isend(self._message(part), dest=0, tag=Tag.SUMS))

    def _message(self, part: NDArray[np.int64]) -> list[Any]:
        return [part, 1, self._types.of(part.nbytes)]

    def _wait(self, request: Any) -> None:
        self._wait_until(request.Test)
