"""Which GPUs each rank sees and would take; by the driver's library, without PyTorch's long import."""

import ctypes
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedhpc.commands.doctor.finding import PROBLEM, WARNING, Finding, by_host, rank_words
from fedhpc.commands.doctor.versions import torch_build
from fedhpc.job.schedulers.base import JobEnvironment

SUBJECT = "GPUs"
DRIVER = "libcuda.so.1"
DEVICES = Path("/proc/driver/nvidia/gpus")
NAME_BYTES = 96
NO_DEVICE = 100
"""CUDA_ERROR_NO_DEVICE: also where CUDA_VISIBLE_DEVICES names none."""


def facts(environment: JobEnvironment) -> dict[str, Any]:
    """Of this rank: what PyTorch was built for, the GPUs that it would see, and those of the machine."""
    build = torch_build()
    return {
        "build": build.get("cuda") or build.get("hip"),
        "is_rocm": bool(build.get("hip")),
        "allotted": environment.gpus_allotted,
        "machine": len(list(DEVICES.iterdir())) if DEVICES.is_dir() else 0,
        **visible(),
    }


def visible() -> dict[str, Any]:
    """The GPUs that the driver shows to this process, by name and place; or what it says against it."""
    try:
        cuda = ctypes.CDLL(DRIVER)
    except OSError:
        return {"gpus": []}
    count, version = ctypes.c_int(), ctypes.c_int()
    if (code := cuda.cuInit(0)) or (code := cuda.cuDeviceGetCount(ctypes.byref(count))):
        return {"gpus": []} | ({} if code == NO_DEVICE else {"driver_error": _driver_words(cuda, code)})
    cuda.cuDriverGetVersion(ctypes.byref(version))
    found = []
    for index in range(count.value):
        device, name, place = ctypes.c_int(), *(ctypes.create_string_buffer(NAME_BYTES) for _ in range(2))
        cuda.cuDeviceGet(ctypes.byref(device), index)
        cuda.cuDeviceGetName(name, NAME_BYTES, device)
        cuda.cuDeviceGetPCIBusId(place, NAME_BYTES, device)
        found.append([name.value.decode(errors="replace"), place.value.decode(errors="replace")])
    return {"gpus": found, "driver": version.value}


def check(facts: Mapping[int, Mapping[str, Any]], indices: Mapping[int, int]) -> Iterator[Finding]:
    """Host by host, what its ranks would compute on.

    Args:
        facts: of each rank, with its host.
        indices: which of the GPUs that it sees each rank would take.
    """
    for host, ranks in by_host(facts):
        devices = [rank for rank in ranks if rank > 0 or len(facts) == 1]
        first = facts[devices[0] if devices else ranks[0]]
        yield Finding(
            SUBJECT, host, "\n".join(_lines(facts, indices, ranks)), *_verdict(facts, indices, devices, first)
        )


def _lines(facts: Mapping[int, Mapping[str, Any]], indices: Mapping[int, int], ranks: list[int]) -> Iterator[str]:
    if not any(facts[rank]["gpus"] for rank in ranks):
        yield "none: all ranks compute on CPUs"
        return
    for rank in ranks:
        gpus = facts[rank]["gpus"]
        if rank == 0 and len(facts) > 1:
            yield f"rank 0: the server, needs none (sees {len(gpus)})"
        elif not gpus or not facts[rank]["allotted"] or not facts[rank]["build"]:
            yield f"rank {rank}: the CPU (sees {len(gpus)})"
        else:
            name, place = gpus[indices[rank] % len(gpus)]
            yield f"rank {rank}: {name} at {place} (sees {len(gpus)})"


def _verdict(
    facts: Mapping[int, Mapping[str, Any]], indices: Mapping[int, int], devices: list[int], first: Mapping[str, Any]
) -> tuple[str, ...]:
    """What is wrong on one host: verdict and advice; nothing where nothing is."""
    seen = {place for rank in devices for _, place in facts[rank]["gpus"]}
    if first.get("driver_error"):
        return PROBLEM, f"the driver does not work ({first['driver_error']}): tell the administrators"
    if first["is_rocm"]:
        return WARNING, "PyTorch is built for ROCm, whose GPUs are not looked at here"
    if seen:
        return _verdict_on_use(facts, indices, devices, first)
    advice = f"the machine has {first['machine']} GPUs, of which the job sees none: ask for some if you want them"
    return (WARNING, advice) if first["machine"] and devices else ()


def _verdict_on_use(
    facts: Mapping[int, Mapping[str, Any]], indices: Mapping[int, int], devices: list[int], first: Mapping[str, Any]
) -> tuple[str, ...]:
    """Where GPUs are seen: whether they can and may be used, and are shared well."""
    if not first["build"]:
        return WARNING, "PyTorch is a build for CPUs: install one for CUDA, or leave the GPUs to others"
    if not first["allotted"]:
        return WARNING, "this job was given no GPU: ask for one, as by --gpus-per-task=1, or set CUDA_VISIBLE_DEVICES"
    if _number(first["build"]) > first["driver"] // 1000:
        return PROBLEM, f"PyTorch needs a driver for CUDA {first['build']}: install a build for an older CUDA"
    seen = {place for rank in devices for _, place in facts[rank]["gpus"]}
    taken = Counter(gpus[indices[rank] % len(gpus)][1] for rank in devices if (gpus := facts[rank]["gpus"]))
    if (twice := max(taken.values())) > 1 and len(taken) < len(seen):
        return WARNING, f"{twice} of {rank_words(devices)} take one GPU while others are free: see docs/gpus.md"
    return ()


def _number(version: str) -> int:
    """The first number of a version."""
    return int(version.partition(".")[0])


def _driver_words(cuda: Any, code: int) -> str:
    words = ctypes.c_char_p()
    cuda.cuGetErrorName(code, ctypes.byref(words))
    return (words.value or b"").decode() or f"error {code}"
