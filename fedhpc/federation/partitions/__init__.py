"""The partitions that fedhpc brings, a file each."""

from fedhpc.federation.partitions import dirichlet, iid, quantity, shards  # noqa: F401
