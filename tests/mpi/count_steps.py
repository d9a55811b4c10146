"""fedhpc, but every process notes the local steps it begins: `count_steps.py FOLDER run CONFIG`.

A line `ROUND DEVICE STEP` in FOLDER/PROCESS.txt each. SIGQUIT shows where every thread is.
"""

import faulthandler
import os
import re
import signal
import sys
from pathlib import Path

from fedhpc import cli

FILE = Path(sys.argv.pop(1)) / f"{os.getpid()}.txt"
set_up = cli.set_up


def set_up_and_count(*arguments):
    from fedhpc import device as devices

    local_update = devices.local_update
    notes = os.open(FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def counted_update(*arguments, round_index, device, beat, **named):
        def counted_beat(activity):
            beat(activity)
            step = re.search(r"step (\d+)", activity)[1]
            os.write(notes, f"{round_index} {device} {step}\n".encode())

        return local_update(*arguments, round_index=round_index, device=device, beat=counted_beat, **named)

    devices.local_update = counted_update
    return set_up(*arguments)


faulthandler.register(signal.SIGQUIT)
cli.set_up = set_up_and_count
sys.exit(cli.main())
