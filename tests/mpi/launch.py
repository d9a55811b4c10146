"""Real ranks: start a program under this environment's mpirun."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

BESIDE_PYTHON = Path(sys.executable).parent / "mpirun"
MPIRUN = str(BESIDE_PYTHON) if BESIDE_PYTHON.exists() else shutil.which("mpirun")
WITH_ULFM = ("--with-ft", "ulfm")


def command(num_ranks, *arguments, options=(), launcher=MPIRUN):
    """Of ``python *arguments`` on so many ranks."""
    return [launcher, *options, "-np", str(num_ranks), sys.executable, *map(str, arguments)]


def environment():
    """Ours without what a launcher around us has set."""
    return {key: value for key, value in os.environ.items() if not key.startswith(("OMPI_", "PMIX_", "PRTE_"))}


def mpirun(num_ranks, *arguments, options=(), timeout_s=300):
    """Run ``python *arguments`` on so many ranks; the completed process, outputs as text."""
    return subprocess.run(
        command(num_ranks, *arguments, options=options),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env=environment(),
        check=False,
    )


def has_ulfm():
    """Whether this mpirun can keep the other ranks alive when one is lost."""
    ask = [MPIRUN, *WITH_ULFM, "-np", "1", "printenv", "OMPI_MCA_mpi_ft_enable"]
    return subprocess.run(ask, capture_output=True, timeout=60, env=environment(), check=False).returncode == 0
