"""The trackers that fedhpc brings, a file each. None imports its package unless a run has it."""
