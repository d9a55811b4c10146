# shellcheck shell=bash
# Runs the cell of an experiment that is this task's of a job array, by launch.sh. `fedhpc sweep EXPERIMENT --submit`
# submits the job files that source it:
#   . jobs/cell.sh "$@"
# SLURM hands their arguments on, and task N runs cell N. Elsewhere the file FEDHPC_ARRAY has a line for each task.

if [ $# -gt 0 ]; then
    set -- "$@" --cell "$SLURM_ARRAY_TASK_ID"
else
    task=${FEDHPC_TASK:-${PBS_ARRAY_INDEX:-${LSB_JOBINDEX:-1}}}
    : "${FEDHPC_ARRAY:?is not set: submit this file by fedhpc sweep EXPERIMENT --submit FILE}"
    eval "set -- $(sed -n "${task}p" "$FEDHPC_ARRAY")"
fi
cell=$(${FEDHPC:-.venv/bin/fedhpc} sweep "$@") || exit
mapfile -t cell <<<"$cell"
CELL_LOG=${cell[0]}
. "${BASH_SOURCE[0]%/*}/launch.sh" "${cell[@]:1}"
