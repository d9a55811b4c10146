"""The schedulers that start batch jobs: what a run asks of each, and how a job is given to it."""
