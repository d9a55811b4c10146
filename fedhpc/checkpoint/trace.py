"""Traces: everything that a server step was computed from, so that anyone can compute it again."""

from pathlib import Path

import h5py
import numpy as np

from fedhpc.checkpoint.state_file import image, write_vector
from fedhpc.files import write_whole
from fedhpc.methods.updates import Layout, RoundUploads, Vector


def write_trace(
    run_dir: Path, round_index: int, layout: Layout, *, broadcast: Vector, uploads: RoundUploads, result: Vector
) -> None:
    """Write traces/round_XXXXXX.h5: broadcast P^t, uploads in sampled order, result P^{t+1}."""
    folder = run_dir / "traces"
    folder.mkdir(exist_ok=True)
    with h5py.File.in_memory() as file:
        file.attrs["device_learning_rate"] = uploads.device_learning_rate
        file["device_ids"] = uploads.device_ids.astype(np.int64)
        file["num_examples"] = uploads.num_examples.astype(np.int64)
        file["counts"] = uploads.counts.astype(np.int64)
        file["num_steps"] = uploads.num_steps.astype(np.int64)
        write_vector(file, "broadcast", broadcast, layout)
        write_vector(file, "uploads", np.stack(uploads.params), layout)
        if uploads.gradients:
            write_vector(file, "gradients", np.stack(uploads.gradients), layout)
        write_vector(file, "result", result, layout)
        write_whole(folder / f"round_{round_index:06d}.h5", image(file))
