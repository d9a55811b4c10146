"""Versions, the processor, and which optional parts are installed; nothing is imported for it."""

import importlib.util
import os
import platform
import re
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import fedhpc
from fedhpc.commands.doctor.finding import OK, PROBLEM, WARNING, Finding, by_value

SUBJECT = "versions"
PACKAGES = ("torch", "transformers", "numpy", "mpi4py", "h5py")
NOT_FOR_USERS = ("test", "bench", "docs")
"""Extras for work on fedhpc itself."""
REQUIREMENT = re.compile(r"([\w.-]+)[^;]*;.*extra == ['\"]([\w-]+)['\"]")
BFLOAT16 = ("amx_bf16", "avx512_bf16", "avx_ne_convert", "bf16", "svebf16")
"""Flags of x86 and Arm processors that compute in bfloat16."""


def facts() -> dict[str, Any]:
    """Of this rank."""
    flags, model = processor()
    return {
        "fedhpc": fedhpc.__version__,
        "Python": platform.python_version(),
        **{name: installed(name) for name in PACKAGES},
        "kernel": platform.release(),
        "processor": model,
        "bfloat16": " ".join(flag for flag in BFLOAT16 if flag in flags) or None,
        "extras": extras(),
    }


def check(facts: Mapping[int, Mapping[str, Any]], dtype: str = "float32") -> Iterator[Finding]:
    """What the ranks have.

    Args:
        facts: of each rank.
        dtype: `model.dtype` of the run.
    """
    for name in ("fedhpc", "Python", *PACKAGES):
        values = {rank: each[name] or "missing" for rank, each in facts.items()}
        verdict, advice = OK, ""
        if "missing" in values.values():
            verdict, advice = PROBLEM, f"install fedhpc with its dependencies: pip install {name}"
        elif len(set(values.values())) > 1:
            verdict, advice = PROBLEM, "start the same installation on every host"
        yield Finding(SUBJECT, name, by_value(values), verdict, advice)
    for name in ("kernel", "processor"):
        values = {rank: each[name] for rank, each in facts.items()}
        differ = name == "processor" and len(set(values.values())) > 1
        advice = "results have the same bits on processors of one kind only: ask for nodes of one kind"
        yield Finding(SUBJECT, name, by_value(values), *((WARNING, advice) if differ else ()))
    values = {rank: each["bfloat16"] or "no instructions" for rank, each in facts.items()}
    slow = dtype == "bfloat16" and "no instructions" in values.values()
    advice = "model.dtype: float32 is faster on this processor, with twice the memory"
    yield Finding(SUBJECT, "bfloat16", by_value(values), *((WARNING, advice) if slow else ()))
    yield Finding(SUBJECT, "extras", by_value({rank: extras_words(each["extras"]) for rank, each in facts.items()}))


def extras_words(found: Mapping[str, bool]) -> str:
    """Optional parts: those there, and those not."""
    if not found:
        return "not known: fedhpc is used without being installed"
    there, missing = ([name for name, is_there in found.items() if is_there is side] for side in (True, False))
    return ", ".join(there or ["none"]) + (f"; not installed: {', '.join(missing)}" if missing else "")


def installed(package: str) -> str | None:
    """The version of a package; None if it is not there."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def extras() -> dict[str, bool]:
    """Each extra of fedhpc, and whether all that it needs is there; empty where fedhpc is not installed."""
    try:
        requirements = metadata.requires("fedhpc") or []
    except metadata.PackageNotFoundError:
        return {}
    found: dict[str, bool] = {}
    for match in filter(None, map(REQUIREMENT.match, requirements)):
        package, extra = match.groups()
        if extra not in NOT_FOR_USERS:
            found[extra] = found.get(extra, True) and installed(package) is not None
    return found


def processor() -> tuple[list[str], str]:
    """The processor's flags, and its name."""
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace").partition("\n\n")[0]
    except OSError:
        text = ""
    lines = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}
    flags = lines.get("flags") or lines.get("Features") or ""
    return flags.split(), lines.get("model name") or platform.machine()


def torch_build() -> dict[str, str | None]:
    """What the installed PyTorch was built for, `cuda` and `hip`, from its file of versions."""
    spec = importlib.util.find_spec("torch")
    try:
        text = Path(os.path.dirname(str(spec and spec.origin)), "version.py").read_text()
    except OSError:
        return {}
    found = (re.search(rf"^{name}\b.*= *'([^']*)'", text, re.M) for name in ("cuda", "hip"))
    return {name: match[1] if match else None for name, match in zip(("cuda", "hip"), found, strict=True)}
