"""Secure aggregation on real ranks: the server's memory holds no upload, and the results are those of `reduce`."""

import re
from pathlib import Path

import pytest
from launch import MPIRUN, mpirun
from look_for_uploads import marked_updates
from tiny import final_prompts, metrics, run_dir

from fedhpc.checkpoint.store import Checkpoints
from fedhpc.commands import cli
from fedhpc.device import training

pytestmark = pytest.mark.skipif(MPIRUN is None, reason="no mpirun beside this Python or on PATH")

LOOK = Path(__file__).parent / "look_for_uploads.py"
CHANGES = {"trace": False, "federation__sample_rate": 1.0, "federation__rounds": 1, "server__method": "fedavg"}


def test_the_server_sees_no_upload_and_ends_with_the_bits_of_reduce(run_config, monkeypatch):
    """Also after a stop within a round; what is looked for is found where uploads are not masked."""
    modes = {"reduced": "reduce", "alone": "reduce", "secure": "secure", "stopped": "secure"}
    configs = {name: run_config(name, exchange__mode=mode, **CHANGES) for name, mode in modes.items()}
    stopped = mpirun(3, LOOK, "--stop", 15, configs["stopped"], timeout_s=90)
    assert stopped.returncode == 0, stopped.stderr
    assert Checkpoints(run_dir(configs["stopped"])).positions()[0].part
    # `secure` is first: what a process has freed may be in its memory still. Where it goes on from within a round, the
    # server has read the uploads in the checkpoint's files, to see that these are whole.
    looked = mpirun(3, LOOK, *(configs[name] for name in ("secure", "reduced", "stopped")), timeout_s=90)
    assert looked.returncode == 0, looked.stderr
    marks = re.search(r"^marks: (\d+) (\d+) \d+$", looked.stdout, re.MULTILINE)
    assert int(marks[1]) == 0
    assert int(marks[2]) > 0
    monkeypatch.setattr(training, "local_updates", marked_updates)
    assert cli.main(["run", str(configs["alone"])]) == 0
    for name in ("reduced", "secure", "stopped"):
        assert final_prompts(configs[name]) == final_prompts(configs["alone"])
    ours, theirs = (metrics(configs[name])[0] for name in ("secure", "reduced"))
    # Two ranks send their own sums, where `reduce` counts one; beside them keys, boxes and shares of 12 devices.
    sums = theirs["bytes_up"] - 12 * 64
    assert ours["bytes_up"] == 12 * 64 + 2 * sums + 12 * (68 + 4 + 12 * 88 + 4 + 12 * 36)
    assert ours["bytes_down"] - theirs["bytes_down"] == 2 * (3 * 72 + 12 * (68 + 4 + 12 * 88 + 3 * 12))
