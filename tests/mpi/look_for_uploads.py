"""Ranks that run jobs in which one device's uploads hold a mark, and the server looks for it in its own memory.

python look_for_uploads.py CONFIG... prints on rank 0 of each job how often the mark was there after a round's exchange;
with --stop STEP before it, a job is stopped before its so many-th local step instead.
"""

import os
import sys
from pathlib import Path

import numpy as np
import run_each

from fedhpc.device import training
from fedhpc.exchange import MpiExchange
from fedhpc.exchange.messages import Op
from fedhpc.model import backbone as models

MARKED = 3
HIDDEN = np.array([0x7C449A1E, 0xA32F6FE7, 0x5DD9B195, 0x3B2ACE9B], np.uint32)
FACTOR = np.uint32(0x9E3779B1)
"""The mark is four small floats, their words times this are the hidden ones. Only device ranks put it together; nothing
that the search makes of the server's memory, the hidden words included, is the mark."""
PART_BYTES = 1 << 24

local_updates = training.local_updates


def marked_updates(*arguments, **named):
    """Local updates after which the marked device's first four exchanged parameters are the mark."""
    for device, update in local_updates(*arguments, **named):
        if device == MARKED:
            update.params[:4] = (HIDDEN * np.uint32(pow(int(FACTOR), -1, 1 << 32))).view(np.float32)
        yield device, update


def count_marks():
    """How often the mark is in this process's memory that can be written, or is shared."""
    count, memory = 0, os.open("/proc/self/mem", os.O_RDONLY)
    for line in Path("/proc/self/maps").read_text().splitlines():
        (first, _, last), access = line.split()[0].partition("-"), line.split()[1]
        if access[0] == "r" and ("w" in access or "s" in access) and "[v" not in line:
            for begin in range(int(first, 16), int(last, 16), PART_BYTES):
                count += marks_in(memory, begin, min(PART_BYTES + 12, int(last, 16) - begin))
    os.close(memory)
    return count


def marks_in(memory, begin, size):
    try:
        words = np.frombuffer(os.pread(memory, size, begin), np.uint32)
    except OSError:  # of a device, or a page of a file that is shorter by now
        return 0
    starts = np.flatnonzero(words[:-3] * FACTOR == HIDDEN[0])
    return sum(np.array_equal(words[start : start + 4] * FACTOR, HIDDEN) for start in starts)


def looking_request(exchange, command, *arguments, **named):
    """A request of the server, after which the mark is looked for if it was about uploads."""
    records = request(exchange, command, *arguments, **named)
    if command.op in (Op.TRAIN, Op.UNMASK):
        found[config] = found.get(config, 0) + count_marks()
    return records


if __name__ == "__main__":
    run_each.load_once = models.load_frozen  # a copy lies otherwise in memory, and products may be rounded otherwise
    found, request = {}, MpiExchange.request
    training.local_updates, MpiExchange.request = marked_updates, looking_request
    step, configs = (int(sys.argv[2]), sys.argv[3:]) if sys.argv[1] == "--stop" else (0, sys.argv[1:])
    for config in configs:
        assert run_each.run(config, step) == (Op.SUSPEND if step else Op.FINISH)
    if found:
        print("marks:", *found.values())
