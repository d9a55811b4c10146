"""Tasks, files of examples, prepared data."""
