"""Parts for fedhpc of somebody else's: a method, a tuning, a partition, a tracker; a file each."""

from acme_federated import csv_tracker, median, scaling, sorted_partition  # noqa: F401
