"""Memory that `fedhpc plan` states for each kind of rank, against the peak of a run's ranks.

    python benchmarks/plan.py PREPARED... [--cases NAME...] [--json FILE]

PREPARED: folders that `fedhpc prepare` wrote, of any model; of each model and head the first is taken. Every case is a
run with two ranks, a server and a device rank, and some are one process: a round of four devices and an evaluation. A
peak is the largest resident set (VmHWM), of which a mapped model's pages are a part. `full` trains all weights: leave
it out for a large model.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from fedhpc.commands.plan_memory import memory_parts
from fedhpc.config.file import load_config
from fedhpc.data.prepared import PreparedData
from fedhpc.server.job import load_job

ROOT = Path(__file__).parents[1]
BFLOAT16 = {"model.dtype": "bfloat16"}
CASES = {
    "float32": {},
    "bfloat16": BFLOAT16,
    "pack 4": {**BFLOAT16, "device.pack": 4},
    "evaluation of 128": {"device.batch_size": 2, "evaluate.batch_size": 128},
    "recomputation": {"model.gradient_checkpointing": True, "device.batch_size": 32},
    "lora": {**BFLOAT16, "tuning.kind": "lora"},
    "prepacked": {"model.prepack_weights": True},
    "prompt_tuning": {**BFLOAT16, "tuning.kind": "prompt_tuning"},
    "full": {
        "tuning.kind": "full",
        "selection.strategy": "all",
        "federation.num_devices": 2,
        "server.method": "fedavg",
    },
    "vocabulary": {**BFLOAT16, "tuning.loss": "vocabulary"},
    "ratio auto": {
        "selection.ratio": "auto",
        "selection.warmup_rounds": 1,
        "device.batch_size": 4,
        "federation.num_devices": 2,
        "federation.rounds": 2,
    },
}
ALSO_ALONE = ("float32", "bfloat16")
"""Cases that are run as one process, too."""
USUAL = {
    "federation": {"num_devices": 4, "sample_rate": 1.0, "rounds": 1},
    "tuning": {"num_tokens": 5},
    "device": {"epochs": 1, "batch_size": 8},
    "evaluate": {"every": 1},
}


def write_config(folder, prepared, settings):
    """A case's configuration file."""
    description = PreparedData.open(prepared, verify=False).description
    config = {"run_dir": str(folder / "run"), "model": {"name": description.model}, "data": {"path": str(prepared)}}
    config |= {section: dict(keys) for section, keys in USUAL.items()}
    config["tuning"]["head"] = description.head
    for key, value in settings.items():
        section, leaf = key.split(".")
        config.setdefault(section, {})[leaf] = value
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def measured(config, ranks):
    """Largest resident set of each rank of a run, in bytes."""
    from launch import command, environment

    arguments = [sys.executable, "-m", "fedhpc", "run", str(config)]
    started = command(ranks, *arguments[1:]) if ranks > 1 else arguments
    process = subprocess.Popen(
        started, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment(), cwd=ROOT
    )
    peaks = {}
    while process.poll() is None:
        for pid in [process.pid, *descendants(process.pid)]:
            if found := rank_and_peak(pid):
                peaks[found[0]] = max(found[1], peaks.get(found[0], 0))
        time.sleep(0.1)
    if process.returncode:
        sys.exit(process.stderr.read())
    return [peaks[rank] for rank in sorted(peaks)]


def descendants(pid):
    """Processes that a process started, and those that they did."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return
    for child in map(int, children):
        yield child
        yield from descendants(child)


def rank_and_peak(pid):
    """A rank's number and its largest resident set so far; None of a process that is no rank, or none any more."""
    try:
        name = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0]
        environ = dict(entry.partition(b"=")[::2] for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
        status = Path(f"/proc/{pid}/status").read_text().splitlines()
        peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return None
    if os.fsdecode(name) != sys.executable:
        return None
    return int(environ.get(b"OMPI_COMM_WORLD_RANK", 0)), 1024 * peak


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prepared", type=Path, nargs="+")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests/mpi"))
    figures = []
    print(f"{'model':<12} {'case':<18} {'rank':<16} {'plan MB':>8} {'peak MB':>8} {'ratio':>6}")
    sets = {}
    for prepared in map(Path.absolute, arguments.prepared):
        description = PreparedData.open(prepared, verify=False).description
        sets.setdefault((description.model, description.head), (prepared, description))
    for prepared, description in sets.values():
        for case in arguments.cases:
            if case == "vocabulary" and description.head == "linear":
                continue
            for ranks in (2, 1) if case in ALSO_ALONE else (2,):
                with tempfile.TemporaryDirectory() as folder:
                    config = write_config(Path(folder), prepared, CASES[case])
                    planned = memory_parts(load_job(load_config(str(config), [])), ranks)
                    peaks = measured(config, ranks)
                for (role, parts), peak in zip(planned.items(), peaks, strict=True):
                    plan, name = sum(parts.values()), Path(description.model).name
                    about = {"model": name, "case": case, "role": role}
                    figures.append({**about, "plan": plan, "peak": peak, "parts": parts})
                    numbers = f"{plan / 1e6:>8.0f} {peak / 1e6:>8.0f} {plan / peak:>6.2f}"
                    print(f"{name:<12} {case:<18} {role:<16} {numbers}", flush=True)
                    if arguments.json:
                        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
