#!/bin/bash
# my reviews.yaml as a job, written by `fedhpc submit`. By hand, from the same folder:
#   flux batch 'a job'
# flux: --job-name=fedhpc-my_reviews
# flux: --bank=lab
# flux: --queue=short
# flux: --nodes=2
# flux: --nslots=2
# flux: --cores-per-slot=2
# flux: --time-limit=90m
# flux: --output=fedhpc-my_reviews-{{id}}.out

# module load openmpi
export FEDHPC=COMMAND
export FEDHPC_RANKS=4
export FEDHPC_SCHEDULER=flux
export FEDHPC_JOB_FILE='a job'
export FEDHPC_REQUEUE=no
. TEMPLATES/launch.sh 'my reviews.yaml' --set seed=7
