"""Limits of the control groups around this process: processor time and memory, of version 1 and 2."""

import os
from collections.abc import Iterator
from contextlib import suppress

from fedhpc.job.control_groups import OWN, control_groups

NO_LIMIT = 1 << 60
"""Version 1 writes a huge number where there is none."""


def processor_limit() -> float | None:
    """Cores' worth of time that is allowed; None without a limit."""
    found = [int(quota) / int(period) for quota, period in map(str.split, _read("cpu.max")) if quota != "max"]
    quotas, periods = (list(map(int, _read(f"cpu.cfs_{name}_us"))) for name in ("quota", "period"))
    found += [quota / period for quota, period in zip(quotas, periods, strict=False) if quota > 0]
    return min(found, default=None)


def memory_limit() -> int | None:
    """Bytes that the processes of the group may have together; None without a limit."""
    found = [int(text) for name in ("memory.max", "memory.limit_in_bytes") for text in _read(name) if text != "max"]
    return min((limit for limit in found if limit < NO_LIMIT), default=None)


def _read(name: str) -> Iterator[str]:
    """What a file of this name has in the process's groups and in those around them."""
    try:
        listing = os.fsdecode(OWN.read_bytes())
    except OSError:
        return
    for _, folder in control_groups(listing):
        with suppress(OSError):  # of another controller, or hidden in a container
            yield (folder / name).read_text().strip()
