"""The partitions that fedhpc brings, a file each."""
