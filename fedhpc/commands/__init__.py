"""The commands: `run`, `plan`, `inspect`, `report`, `export`, `predict`, `sweep`."""
