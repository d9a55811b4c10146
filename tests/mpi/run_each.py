"""Ranks that run several jobs, one after the other, each stopped once on its way: python run_each.py CONFIG..."""

import sys
from argparse import Namespace
from contextlib import ExitStack

from fedhpc import cli
from fedhpc.exchange import connect
from fedhpc.jobenv import JobEnvironment
from fedhpc.messages import Op
from fedhpc.stopping import StopRequest

STOP_AT_STEP = 4


def run(config, stop_at_step=0):
    """Start a job, or go on with it; how it ended. The last rank asks for a stop before its so many-th local step."""
    stop, environment = StopRequest(), JobEnvironment()
    exchange = connect(stop, environment, 60.0)
    beat, steps = exchange.beat, 0

    def counting_beat(activity):
        nonlocal steps
        steps += activity.startswith("training")
        if steps == stop_at_step and exchange.rank == exchange.size - 1:
            stop.ask("test")
        beat(activity)

    if stop_at_step:
        exchange.beat = counting_beat
    with ExitStack() as held:
        return cli.set_up(Namespace(config=config, set=[], resume="auto"), exchange, environment, held)()


if __name__ == "__main__":
    for path in sys.argv[1:]:
        assert run(path, STOP_AT_STEP) == Op.SUSPEND, path
        assert run(path) == Op.STOP, path
