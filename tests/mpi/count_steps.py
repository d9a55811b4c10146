"""fedhpc, but every process notes the local steps it begins: `count_steps.py FOLDER run CONFIG`.

A line `ROUND DEVICE STEP` in FOLDER/PROCESS.txt each. SIGQUIT shows where every thread is.
"""

import faulthandler
import os
import re
import signal
import sys
from pathlib import Path

from fedhpc.commands import cli

FILE = Path(sys.argv.pop(1)) / f"{os.getpid()}.txt"
set_up = cli.set_up


def set_up_and_count(*arguments):
    from fedhpc.device import training

    local_updates = training.local_updates
    notes = os.open(FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def counted_updates(*arguments, round_index, beat, **named):
        def counted_beat(activity):
            beat(activity)
            for device, step in re.findall(r"device (\d+) step (\d+)", activity):
                os.write(notes, f"{round_index} {device} {step}\n".encode())

        return local_updates(*arguments, round_index=round_index, beat=counted_beat, **named)

    training.local_updates = counted_updates
    return set_up(*arguments)


faulthandler.register(signal.SIGQUIT)
cli.set_up = set_up_and_count
sys.exit(cli.main())
