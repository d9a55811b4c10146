"""`fedhpc sweep`: the runs of an experiment, one after the other or as a job array, and their tables."""
