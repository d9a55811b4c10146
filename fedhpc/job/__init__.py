"""The batch job around a run: its environment, signals, lock, log."""
