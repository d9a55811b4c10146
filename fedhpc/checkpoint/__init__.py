"""Checkpoints and traces: HDF5 files, and what identifies a run."""
