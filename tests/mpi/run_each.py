"""Ranks that run several jobs, one after the other: python run_each.py CONFIG..."""

import sys
from argparse import Namespace
from contextlib import ExitStack

from fedhpc import cli
from fedhpc.exchange import connect
from fedhpc.jobenv import JobEnvironment
from fedhpc.messages import Op
from fedhpc.stopping import StopRequest


def run(config, stop_at_step=0):
    """Start a job, or go on with it, and perhaps ask for a stop before its so many-th local step; how it ended."""
    stop, environment = StopRequest(), JobEnvironment()
    exchange = connect(stop, environment, 60.0)
    beat, steps = exchange.beat, 0

    def counting_beat(activity):
        nonlocal steps
        steps += activity.startswith("training")
        if steps == stop_at_step:
            stop.ask("test")
        beat(activity)

    if stop_at_step:
        exchange.beat = counting_beat
    with ExitStack() as held:
        return cli.set_up(Namespace(config=config, set=[], resume="auto"), exchange, environment, held)()


if __name__ == "__main__":
    for path in sys.argv[1:]:
        assert run(path) == Op.STOP, path
