"""Traces: everything that a server step was computed from, so that anyone can compute it again."""

from pathlib import Path

import h5py
import numpy as np

from fedhpc.state_file import write_vector
from fedhpc.updates import Layout, RoundUploads, Vector


def write_trace(
    run_dir: Path, round_index: int, layout: Layout, *, broadcast: Vector, uploads: RoundUploads, result: Vector
) -> None:
    """Write traces/round_XXXXXX.h5: broadcast P^t, uploads in sampled order, result P^{t+1}."""
    folder = run_dir / "traces"
    folder.mkdir(exist_ok=True)
    # Nobody else writes here, and where there are no locks, HDF5 would refuse to.
    with h5py.File(folder / f"round_{round_index:06d}.h5", "w", locking=False) as file:
        file.attrs["device_learning_rate"] = uploads.device_learning_rate
        file["device_ids"] = uploads.device_ids.astype(np.int64)
        file["num_examples"] = uploads.num_examples.astype(np.int64)
        file["num_steps"] = uploads.num_steps.astype(np.int64)
        write_vector(file, "broadcast", broadcast, layout)
        write_vector(file, "uploads", np.stack(uploads.params), layout)
        if uploads.gradients:
            write_vector(file, "gradients", np.stack(uploads.gradients), layout)
        write_vector(file, "result", result, layout)
