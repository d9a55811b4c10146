"""A rank whose steps take most of the time after which it would be given up. What takes seconds takes tenths here."""

import time

from fedhpc.exchange import MpiExchange, control_channel
from fedhpc.exchange.messages import NO_RECORD, Command, Op
from fedhpc.job.stopping import StopRequest

control_channel.LONGEST_GAP_S = 0.25
exchange = MpiExchange(StopRequest())
exchange.timeout_s = 2.0  # the start of a rank may take longer
if exchange.rank == 0:
    exchange.request(Command(op=Op.TRAIN), NO_RECORD, [0])
    print("nobody was given up")
else:
    exchange.receive()
    for _ in range(3):
        exchange.beat("training")
        time.sleep(1.2)
    exchange.reply(NO_RECORD.zeros(0))
