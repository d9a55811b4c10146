"""Rank 2 goes on with its work only when rank 1's upload has left."""

import numpy as np
from blind import make_blind
from mpi4py import MPI

from fedhpc.exchange import MpiExchange
from fedhpc.exchange.messages import Command, Op, upload_headers, upload_payloads, upload_record
from fedhpc.job.stopping import StopRequest

FLOATS = 1 << 20  # too many to leave before anyone takes them

make_blind(1, 2)
exchange = MpiExchange(StopRequest())
record_type = upload_record(FLOATS)
if exchange.rank == 0:
    records = exchange.request(Command(op=Op.TRAIN), record_type, [1, 1])
    assert upload_headers(records)["device"].tolist() == [1, 2]
    assert upload_payloads(records, FLOATS)[:, [0, -1]].tolist() == [[1, 1], [2, 2]]
    print("all have come")
else:
    exchange.receive()
    if exchange.rank == 2:
        MPI.COMM_WORLD.recv(source=1)
    reply = record_type.zeros(1)
    upload_headers(reply)["device"] = exchange.rank
    np.copyto(upload_payloads(reply, FLOATS), exchange.rank)
    exchange.reply(reply)
    if exchange.rank == 1:
        MPI.COMM_WORLD.send(None, dest=2)
