"""fedhpc, but rank 3's first local update of the third round raises."""

import os
import sys

from fedhpc.commands import cli
from fedhpc.device import training

local_updates = training.local_updates


def failing_local_updates(*arguments, round_index, **named):
    if round_index == 2 and os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK")) == "3":
        raise RuntimeError("the cosmic ray that this test is about")
    return local_updates(*arguments, round_index=round_index, **named)


training.local_updates = failing_local_updates
sys.exit(cli.main())
