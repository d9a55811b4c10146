"""Five ranks lose number 2, and number 3 while they repair that; the others go on."""

import os
import signal
import time

from blind import make_blind

from fedhpc.errors import RanksLost
from fedhpc.exchange import MpiExchange
from fedhpc.exchange.messages import Command, Note, NoteKind, Op, upload_headers, upload_record
from fedhpc.job.stopping import StopRequest


def die(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)


make_blind(1)
exchange = MpiExchange(StopRequest())
old_rank, saved = exchange.rank, []
exchange.on_saved = saved.append
if old_rank == 2:
    die()
try:
    while True:
        exchange.progress()
        time.sleep(0.01)
except RanksLost:
    if old_rank == 3:
        exchange._join = die
exchange.post(Note(kind=NoteKind.ALL_SAVED))  # of a checkpoint that the ranks which are left know nothing of
exchange.repair()
record_type = upload_record(1)
if exchange.rank == 0:
    records = exchange.request(Command(op=Op.TRAIN), record_type, [1] * exchange.num_workers)
    assert upload_headers(records)["device"].tolist() == [1, 4]
    time.sleep(0.2)
    exchange.progress()
    assert not saved
    print("two have gone on")
else:
    exchange.receive()
    exchange.beat("training")
    reply = record_type.zeros(1)
    upload_headers(reply)["device"] = old_rank
    exchange.reply(reply)
exchange.finalize()
os._exit(0)  # after a repair, MPI may hang at the end
