"""Rank 1 makes its second upload when the first has left, and rank 2 goes on when rank 1 is done.

Before that, rank 1 is halted after its first upload.
"""

import numpy as np
from blind import make_blind
from mpi4py import MPI

from fedhpc.errors import Halt
from fedhpc.exchange import MpiExchange
from fedhpc.exchange.messages import Command, Op, upload_headers, upload_payloads, upload_record
from fedhpc.job.stopping import StopRequest

FLOATS = 1 << 20  # too many to leave before anyone takes them

make_blind(1, 2)
exchange = MpiExchange(StopRequest())
record_type = upload_record(FLOATS)


def uploads(*devices):
    records = exchange.rows(record_type, len(devices))
    upload_headers(records)["device"] = devices
    upload_payloads(records, FLOATS)[:] = np.array(devices)[:, None]
    return records


if exchange.rank == 0:
    try:
        exchange.request(Command(op=Op.TRAIN), record_type, [2, 1])
    except Halt:
        print("halted")
    records = exchange.request(Command(op=Op.TRAIN), record_type, [2, 1])
    assert upload_headers(records)["device"].tolist() == [11, 12, 2]
    assert upload_payloads(records, FLOATS)[:, [0, -1]].tolist() == [[11, 11], [12, 12], [2, 2]]
    print("all have come")
elif exchange.rank == 1:
    exchange.receive()
    exchange.send_ahead(uploads(1, 0), 1)
    exchange.reply(None)
    exchange.receive()
    exchange.send_ahead(uploads(11, 0), 1)
    while not exchange._transfer.leaving[0].Test():
        exchange.beat("at work on the second")
    exchange.reply(uploads(11, 12))
    MPI.COMM_WORLD.send(None, dest=2)
else:
    exchange.receive()
    exchange.reply(uploads(9))
    exchange.receive()
    MPI.COMM_WORLD.recv(source=1)
    exchange.reply(uploads(2))
