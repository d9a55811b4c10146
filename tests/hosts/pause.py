"""fedhpc, but a rank waits in the middle of round 1: `pause.py PHASE FOLDER run CONFIG`.

It makes FOLDER/paused and waits for FOLDER/go. In the broadcast that is rank 0, in other phases the last rank. From
that round on ranks may be silent for `TIMEOUT_S`; before, while all start on a busy machine, for as long as is set.
"""

import sys
import time
from functools import wraps
from pathlib import Path

from fedhpc.commands import cli
from fedhpc.exchange import MpiExchange
from fedhpc.exchange.messages import Op

PHASE, FOLDER = sys.argv.pop(1), Path(sys.argv.pop(1))
ROUND, TIMEOUT_S = 1, 6.0
METHOD, OP, ACTIVITY = {
    "broadcast": ("_broadcast", Op.TRAIN, ""),
    "training": ("beat", Op.TRAIN, "training"),
    "gather": ("reply", Op.TRAIN, ""),
    "evaluation": ("beat", Op.EVALUATE, "evaluating"),
    "checkpoint": ("post", Op.SAVE, ""),
}[PHASE]
request, receive, method = MpiExchange.request, MpiExchange.receive, getattr(MpiExchange, METHOD)
under_way = []
"""The last command."""


def note(exchange, command):
    under_way[:] = [command]
    if command.round == ROUND:
        exchange.timeout_s = TIMEOUT_S


def noted_request(self, command, *arguments, **named):
    note(self, command)
    return request(self, command, *arguments, **named)


def noted_receive(self):
    command = receive(self)
    note(self, command)
    return command


@wraps(method)
def pausing(self, *arguments):
    rank = 0 if PHASE == "broadcast" else self.size - 1
    its_time = under_way and under_way[0].op == OP and under_way[0].round == ROUND
    if self.rank == rank and its_time and str(arguments[0]).startswith(ACTIVITY) and not (FOLDER / "paused").exists():
        (FOLDER / "paused").touch()
        while not (FOLDER / "go").exists():
            time.sleep(0.01)
    return method(self, *arguments)


MpiExchange.request, MpiExchange.receive = noted_request, noted_receive
setattr(MpiExchange, METHOD, pausing)
sys.exit(cli.main())
