"""Real ranks: start a program under this environment's mpirun."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

BESIDE_PYTHON = Path(sys.executable).parent / "mpirun"
MPIRUN = str(BESIDE_PYTHON) if BESIDE_PYTHON.exists() else shutil.which("mpirun")


def mpirun(num_ranks, *arguments, timeout_s=300):
    """Run ``python *arguments`` on so many ranks; the completed process, outputs as text."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("OMPI_", "PMIX_", "PRTE_"))}
    return subprocess.run(
        [MPIRUN, "-np", str(num_ranks), sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env=environment,
        check=False,
    )
