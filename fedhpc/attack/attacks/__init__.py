"""The attacks that fedhpc brings, a file each."""
