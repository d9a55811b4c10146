"""Ranks that run several jobs, one after the other: python run_each.py CONFIG... Or one that is stopped before its so
many-th local step: python run_each.py --stop STEP CONFIG.

Weights are read once: most of a small job's time goes into that.
"""

import copy
import sys
from contextlib import ExitStack
from unittest import mock

from fedhpc.commands import cli
from fedhpc.config.file import load_config
from fedhpc.exchange import connect
from fedhpc.exchange.messages import Op
from fedhpc.job.environment import job_environment
from fedhpc.job.quick_start import quick_start
from fedhpc.job.stopping import StopRequest

with quick_start():  # as the command
    from fedhpc.model import backbone as models

_LOAD, _LOADED = models.load_frozen, {}


def load_once(config, **place):
    """A copy of a backbone as it was loaded first."""
    if config.name not in _LOADED:
        _LOADED[config.name] = _LOAD(config, **place)
    return copy.deepcopy(_LOADED[config.name])


def run(config, stop_at_step=0):
    """Start a job, or go on with it, and perhaps ask for a stop before its so many-th local step; how it ended."""
    stop, environment = StopRequest(), job_environment()
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
    with ExitStack() as held, mock.patch.object(models, "load_frozen", load_once):
        return cli.set_up(lambda: load_config(config), "auto", exchange, environment, held)()


if __name__ == "__main__":
    if sys.argv[1] == "--stop":
        assert run(sys.argv[3], int(sys.argv[2])) == Op.SUSPEND
        sys.exit()
    for path in sys.argv[1:]:
        assert run(path) == Op.FINISH, path
