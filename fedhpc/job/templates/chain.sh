#!/usr/bin/env bash
# For sites where SLURM may not requeue jobs: submits a job file several times, each to go on where the one before
# stopped.
#   jobs/chain.sh 5 jobs/llama7b_rte.slurm [ARGUMENT ...]
# When one of them finishes the run, SLURM removes the rest.
set -euo pipefail
if [ $# -lt 2 ] || ! [ "$1" -ge 1 ] 2>/dev/null; then
    echo "usage: $0 NUMBER FILE.slurm [ARGUMENT ...]" >&2
    exit 2
fi
number=$1
shift
export FEDHPC_REQUEUE=no
jobs=''
trap '[ -z "$jobs" ] || echo "submitted; to cancel all: scancel${jobs//:/ }"' EXIT
for ((i = 0; i < number; i++)); do
    # Every earlier job must have ended without success: one that SLURM removed counts as such.
    job=$(sbatch --parsable --no-requeue --kill-on-invalid-dep=yes ${jobs:+"--dependency=afternotok$jobs"} "$@")
    jobs=$jobs:${job%;*}
done
