import ctypes
import logging
import signal

import pytest
import texts
import tiny
import torch

from fedhpc.commands import cli
from fedhpc.job.log import log
from fedhpc.job.stopping import STOP_SIGNALS

torch.set_num_threads(1)  # the tests' models are too small to share


def pytest_collection_modifyitems(items):
    """SLURM's tests, the longest file, begin first: no worker is left with them alone at the end."""
    items.sort(key=lambda item: item.path.parent.name != "slurm")


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Backbone, prepared data and configuration; not to be changed."""
    return tiny.write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def prepared_texts(world, tmp_path_factory):
    """Texts to be generated, prepared for the world's backbone; not to be changed."""
    return texts.prepare_texts(tmp_path_factory.mktemp("texts"), world.parent / "backbone")


@pytest.fixture
def run_config(world, tmp_path):
    """A configuration file of the test's own, with its own run directory and changes given by dotted key."""

    def write(run="run", **changes):
        return tiny.write_config(world, tmp_path, run, **changes)

    return write


@pytest.fixture
def reports():
    """The log's lines from now on."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    before, log.handlers[:] = log.handlers[:], [handler]
    yield lines
    log.handlers[:] = before


@pytest.fixture
def unprivileged():
    """Without the capabilities by which root reads and enters everything: files count as for any other user."""
    libc, header = ctypes.CDLL(None, use_errno=True), (ctypes.c_uint32 * 2)(0x20080522, 0)
    before = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice
    assert libc.capget(header, before) == 0
    without = (ctypes.c_uint32 * 6)(before[0] & ~0b110, *before[1:])  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    assert libc.capset(header, without) == 0
    yield
    assert libc.capset(header, before) == 0


@pytest.fixture
def fedhpc(capfd):
    """Run the command in this process: (exit status, standard output, standard error)."""

    def command(*arguments):
        capfd.readouterr()
        status = cli.main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return status, out, err

    yield command
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
