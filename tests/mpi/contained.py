"""A request, replies and a device's state between three ranks, after what a run does before it starts MPI.

Rank 0 says who shares its memory, and which transports Open MPI was told to take.
"""

import os

import numpy as np

from fedhpc.exchange import TRANSPORTS, MpiExchange, prepare_mpi
from fedhpc.exchange.messages import Command, Op, RecordType
from fedhpc.job.stopping import StopRequest

NUMBERS = RecordType(np.dtype("<i8"), (300_000,))
COUNTS = [1, 2]

prepare_mpi()
exchange = MpiExchange(StopRequest())
payload = np.arange(500_000, dtype=np.float32)
if exchange.rank == 0:
    records = exchange.request(Command(op=Op.TRAIN, payload=payload), NUMBERS, COUNTS)
    np.testing.assert_array_equal(records, np.repeat([[1], [2], [2]], 300_000, axis=1))
    print("near", sorted(exchange._connection.doorbells))
    print("transports", os.environ.get(TRANSPORTS))
else:
    np.testing.assert_array_equal(exchange.receive().payload, payload)
    other = 2 - exchange.rank
    mine, theirs = (bytes([number]) * 1_000_000 for number in (exchange.rank, other + 1))
    assert exchange.move_states([(other, mine)], [other]) == [theirs]
    records = exchange.rows(NUMBERS, COUNTS[exchange.rank - 1])
    records[:] = exchange.rank
    exchange.reply(records)
exchange.finalize()
