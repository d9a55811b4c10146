"""Who takes part: partitions, sampling, packs."""
