"""fedhpc, but a fault strikes rank 2: `fault.py FAULT run CONFIG`."""

import os
import shutil
import sys
from pathlib import Path

import yaml

from fedhpc.checkpoint.store import Checkpoints
from fedhpc.commands import cli
from fedhpc.device import training
from fedhpc.errors import CheckpointError

FAULT = sys.argv.pop(1)
RUN_DIR = Path(yaml.safe_load(Path(sys.argv[2]).read_text())["run_dir"])
IS_RANK_2 = "2" in (os.environ.get("OMPI_COMM_WORLD_RANK"), os.environ.get("PMI_RANK"))


def unreadable(*arguments):
    raise CheckpointError("unreadable")


def update_in_a_vanished_folder(*arguments, **named):
    shutil.rmtree(RUN_DIR)
    raise RuntimeError("the run directory is gone")


def edited_meanwhile(path, overrides):
    return load_config(path, [*overrides, "device.learning_rate=0.001"])


load_config = cli.load_config
if IS_RANK_2 and FAULT == "another configuration":
    cli.load_config = edited_meanwhile
elif IS_RANK_2 and FAULT == "restore":
    Checkpoints.load_devices = unreadable
elif IS_RANK_2:
    training.local_updates = update_in_a_vanished_folder
sys.exit(cli.main())
