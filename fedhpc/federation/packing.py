"""`device.pack: auto`: how many devices train side by side, from a few steps on the machine at hand."""

import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from fedhpc.federation.sampling import PROBES
from fedhpc.job.control_groups import OWN, control_groups

CLOSE = 0.97
"""A larger pack has to be faster than this share of a smaller one's time: below are chance and padding."""
MEMORY_FILES = {
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
"""By controllers, of control groups of version 2 and 1: their limit, their use, and what of it are cached files, which
give way."""


def largest_pack(devices_per_round: int, num_workers: int) -> int:
    """The largest N, a power of two, with which every worker has a pack."""
    share = max(1, devices_per_round // num_workers)
    return int(min(2 ** (PROBES - 1), 2 ** (share.bit_length() - 1)))


def probe(train: Callable[[int, bool], int], *, largest: int, ranks_here: int) -> np.ndarray:
    """Seconds of a device's step with 1, 2, 4 ... devices side by side, shape [PROBES]; inf where memory may not do.

    Args:
        train: makes steps with so many devices, on their longest texts or any, and says how many.
        largest: try no more devices than this.
        ranks_here: processes that share this host's memory.
    """
    seconds = np.full(PROBES, np.inf)
    for place in range(largest.bit_length()):
        pack = 2**place
        before, fits = _peak_bytes(), True
        try:
            train(pack, True)  # needs most memory; warms caches and allocators
            began = time.perf_counter()
            steps = train(pack, False)
            seconds[place] = (time.perf_counter() - began) / (steps * pack)
        except torch.OutOfMemoryError:
            fits = False
        if not fits:  # here nothing holds the tensors of the step that failed
            torch.cuda.empty_cache()
            break
        if 2 * (_peak_bytes() - before) * ranks_here > available_bytes():
            break
    return seconds


def choose_pack(seconds: np.ndarray) -> int:
    """N from the probes of all workers [W, PROBES]: the fastest on average that all can do."""
    means = seconds.mean(axis=0)
    best = 0
    for place, mean in enumerate(means):
        if mean < CLOSE * means[best]:
            best = place
    return int(2**best)


def available_bytes() -> int:
    """Memory that this host, and every control group of this process that has a limit, have left."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    on_host = int(fields["MemAvailable"].split()[0]) * 1024
    return min([on_host, *left_in_groups(os.fsdecode(OWN.read_bytes()))])


def left_in_groups(listing: str) -> Iterator[int]:
    """Bytes that the control groups of a /proc/PID/cgroup may still take; a job's limit is on a parent of a task's."""
    for controllers, folder in control_groups(listing):
        if controllers in MEMORY_FILES:
            limit, used, cached = MEMORY_FILES[controllers]
            with suppress(OSError, ValueError, KeyError):  # no such file, or "max"
                fields = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                left = int((folder / limit).read_text()) - int((folder / used).read_text())
                yield left + int(fields[cached])


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
