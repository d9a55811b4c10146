"""Job files outside a checkout: where the templates are, and this installation."""

import sys
from pathlib import Path

TEMPLATES = Path(__file__).parent / "templates"
"""launch.sh and what it needs, and job files; jobs/ of a checkout has links to them."""
SWEEP_FILE = "jobs/sweep.slurm"
"""Of a checkout; elsewhere, its template serves."""
COMMAND = f"{sys.executable} -m fedhpc"
"""What job files call, as FEDHPC: several words."""
