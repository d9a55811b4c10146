"""Records of workers near the server and of those that, like the ranks named, cannot see its memory, and their sums.

Where those are masked, which takes no masks here, no more than headers and each worker's own sums leaves it.
"""

import sys

import numpy as np
from blind import make_blind

from fedhpc.exchange import MpiExchange
from fedhpc.exchange.exact_sum import SumSize, Terms
from fedhpc.exchange.messages import (
    UPLOAD_HEADER,
    UPLOAD_HEADER_FLOATS,
    Command,
    Op,
    place_packs,
    upload_headers,
    upload_payloads,
    upload_record,
)
from fedhpc.job.stopping import StopRequest
from fedhpc.methods.updates import Fault

COUNTS = [2, 0, 1, 3]
SIZES = [10, 10, 150_000, 150_000, 7, 7, 70_000, 70_000]  # several blocks, and a part of the last one
NUM_TERMS = sum(COUNTS)


def drawn(turn, *shape):
    return np.random.default_rng(turn).standard_normal(shape, dtype=np.float32)


make_blind(*map(int, sys.argv[1:]))
exchange = MpiExchange(StopRequest())
place = 0 if exchange.rank == 0 else sum(COUNTS[: exchange.rank - 1])
for turn, size in enumerate(SIZES):
    payload, uploads = drawn(turn, size), drawn(10 + turn, NUM_TERMS, size)
    masked = turn % 4 == 3
    record = upload_record(0 if masked else size)
    of = SumSize(num_sums=1, size=size, num_terms=NUM_TERMS, masked=masked) if turn % 2 else None
    if exchange.rank == 0:
        placed = place_packs([[device] for device in range(turn)], np.arange(turn, dtype=np.int32))
        records = exchange.request(Command(op=Op.TRAIN, placed=placed, payload=payload), record, COUNTS, summed=of)
        assert upload_headers(records)["device"].tolist() == list(range(NUM_TERMS))
        if of:
            sums = of.floats(exchange.sums, exchange.exponent)
            np.testing.assert_allclose(sums, uploads.sum(axis=0, dtype=np.float64)[None], rtol=0, atol=1e-14)
            near = [COUNTS[rank - 1] > 0 for rank in exchange._connection.doorbells]
            arrived = sum(near) + (len(near) < len(COUNTS)) if masked else 1
            assert exchange.traffic.bytes_up == NUM_TERMS * UPLOAD_HEADER.itemsize + arrived * of.nbytes
        else:
            np.testing.assert_array_equal(upload_payloads(records, size), uploads)
    else:
        command = exchange.receive()
        np.testing.assert_array_equal(command.payload, payload)
        assert command.packs() == ([[device] for device in range(turn)], list(range(turn)))
        count = COUNTS[exchange.rank - 1]
        mine = uploads[place : place + count]
        # Ranks of both kinds with memory of their own.
        whole = upload_record(size)
        rows = exchange.rows(record, count) if exchange.rank < 3 and not masked else whole.zeros(count)
        upload_headers(rows)["device"] = np.arange(place, place + count)
        upload_headers(rows)["count"], upload_headers(rows)["fault"] = 1, Fault.NONE
        upload_payloads(rows, size)[:] = mine
        if of:
            exchange.add_up(Terms.of_uploads(rows, of))
        exchange.reply(rows[:, :UPLOAD_HEADER_FLOATS] if masked else rows)
if exchange.rank == 0:
    print("near", sorted(exchange._connection.doorbells))
