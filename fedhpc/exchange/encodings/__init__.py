"""The upload encodings that fedhpc brings, a file each."""
