"""Accuracy on real data: methods on TREC, and half of the layers against all of them on SST-2.

    python benchmarks/accuracy.py --model MINILM_DIR --trec TREC_DIR --sst2 SST2_DIR --out runs/accuracy

The data folders hold the tasks' original files, the model folder a local all-MiniLM-L6-v2. Each row is a run of the
shipped jobs/minilm files on 17 ranks; the table also goes to OUT/accuracy.json. A run that is complete is not repeated.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import h5py

from fedhpc.checkpoint.files import SERVER_FILE
from fedhpc.checkpoint.store import Checkpoints

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
HALF = ["selection.strategy=score", "selection.ratio=0.5"]
RUNS = {
    "trec": {"fedavg": ["server.method=fedavg"], "drift_corrected": []},
    "sst-2": {"all layers": [], "half of the layers": HALF},
}
SST2_TRAINING_EXAMPLES = 6000


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--trec", required=True)
    parser.add_argument("--sst2", required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/accuracy"))
    parser.add_argument("--ranks", default="17")
    arguments = parser.parse_args()
    rows = []
    for task, source in (("trec", arguments.trec), ("sst-2", arguments.sst2)):
        prepared = prepare(task, source, arguments)
        for name, overrides in RUNS[task].items():
            rows.append({"task": task, "run": name, **run(task, name, overrides, prepared, arguments)})
    columns = ["task", "run", "layers", "accuracy", "accuracy_global", "megabytes", "seconds"]
    widths = [max(len(column), *(len(str(row[column])) for row in rows)) for column in columns]
    for line in [dict(zip(columns, columns, strict=True)), *rows]:
        print("  ".join(str(line[column]).ljust(width) for column, width in zip(columns, widths, strict=True)))
    (arguments.out / "accuracy.json").write_text(json.dumps(rows, indent=1))


def prepare(task, source, arguments):
    """Prepared data of a task for the model, with a linear head."""
    out = arguments.out / "prepared" / task
    limit = ["--limit-train", str(SST2_TRAINING_EXAMPLES)] if task == "sst-2" else []
    command = [BIN / "fedhpc", "prepare", "--task", task, "--source", source]
    subprocess.run([*command, "--model", arguments.model, "--out", out, "--head", "linear", *limit], check=True)
    return out


def run(task, name, overrides, prepared, arguments):
    """One row of the table, from the last round's metrics."""
    folder = arguments.out / f"{task}-{name.replace(' ', '-')}"
    settings = [f"run_dir={folder}", f"data.path={prepared}", f"model.name={arguments.model}", *overrides]
    command = [BIN / "mpirun", "-np", arguments.ranks, BIN / "fedhpc", "run", ROOT / f"jobs/minilm/{task}.yaml"]
    subprocess.run([*command, *(word for setting in settings for word in ("--set", setting))], check=True)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    checkpoints = Checkpoints(folder)
    with h5py.File(checkpoints.path(checkpoints.positions()[0]) / SERVER_FILE) as file:
        layers = file["selection/layers"][()].tolist()
    return {
        "layers": layers,
        "accuracy": round(records[-1]["accuracy"], 4),
        "accuracy_global": round(records[-1]["accuracy_global"], 4),
        "megabytes": round(sum(record["bytes"] for record in records) / 1e6, 1),
        "seconds": round(sum(record["seconds"]["round"] for record in records), 1),
    }


if __name__ == "__main__":
    main()
