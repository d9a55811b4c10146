#!/bin/bash
# jobs/llama-7b/rte.yaml as a job, written by `fedhpc submit`. By hand, from the same folder:
#   flux batch jobs/llama7b_rte.flux
# flux: --job-name=fedhpc-rte
# flux: --nodes=16
# flux: --nslots=16
# flux: --cores-per-slot=8
# flux: --gpus-per-slot=1
# flux: --time-limit=1440m
# flux: --output=fedhpc-rte-{{id}}.out

# module load openmpi
export FEDHPC_RANKS=17
export FEDHPC_GPUS_PER_NODE=1
export FEDHPC_SCHEDULER=flux
export FEDHPC_JOB_FILE=jobs/llama7b_rte.flux
. jobs/launch.sh jobs/llama-7b/rte.yaml
