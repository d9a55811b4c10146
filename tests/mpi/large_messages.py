"""Two ranks exchange a payload and a record of more than 2 GiB each, and one a device's state with itself.

The ranks named cannot see the server's memory.
"""

import sys

import numpy as np
from blind import make_blind

from fedhpc.exchange import MpiExchange
from fedhpc.exchange.messages import Command, Op, upload_headers, upload_payloads, upload_record
from fedhpc.job.stopping import StopRequest

FLOATS = (1 << 29) + 1000
assert 4 * FLOATS > 1 << 31
PLACES = [0, 1, (1 << 29) - 1, 1 << 29, FLOATS - 1]

make_blind(*map(int, sys.argv[1:]))
exchange = MpiExchange(StopRequest())
record_type = upload_record(FLOATS)
if exchange.rank == 0:
    payload = np.zeros(FLOATS, np.float32)
    payload[PLACES] = [1, 2, 3, 4, 5]
    records = exchange.request(Command(op=Op.TRAIN, round=9, layers=(0, 3), payload=payload), record_type, [1])
    (header,), (params,) = upload_headers(records), upload_payloads(records, FLOATS)
    assert params[PLACES].tolist() == [2, 4, 6, 8, 10]
    assert header["device"] == 7
    assert exchange.traffic.bytes_down == 72 + 4 * FLOATS
    assert exchange.traffic.bytes_up == 64 + 4 * FLOATS
    print("exchanged", exchange.traffic.bytes_up)
else:
    state = bytearray(4 * FLOATS + 1)
    state[-1] = 9
    (received,) = exchange.move_states([(0, state)], [0])
    assert received == state
    del state, received
    command = exchange.receive()
    assert (command.op, command.round, command.layers) == (Op.TRAIN, 9, (0, 3))
    reply = record_type.zeros(1)
    (header,), (params,) = upload_headers(reply), upload_payloads(reply, FLOATS)
    header["device"] = 7
    np.multiply(command.payload, 2, out=params)
    exchange.reply(reply)
