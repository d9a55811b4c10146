# shellcheck shell=bash disable=SC2034
# What launch.sh does otherwise for each scheduler, here for SLURM (sbatch(1), squeue(1), scontrol(1)).

scheduler=SLURM ends=TERM how_many='ask for --ntasks' several=$templates/chain.sh slots=
unset "${!SQUEUE_@}" SLURM_CLUSTERS # the user's settings could hide the job from squeue
# A task of an array has a number of its own, but by that of the last task SLURM would take the whole array.
job=$(squeue --noheader --states=all --jobs="$SLURM_JOB_ID" --format='%A %i' | sed -n "s/^$SLURM_JOB_ID \(.*_.*\)/\1/p")
[ "$SLURM_JOB_ID" != "${SLURM_ARRAY_JOB_ID:-}" ] || job=${job:-${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
ranks=${SLURM_NTASKS:-}
restarts=${SLURM_RESTART_COUNT:-0}

prepare_launch() {
    unset SLURM_EXPORT_ENV SRUN_EXPORT_ENV # of `sbatch --export=NONE`: daemons and ranks need what is exported here
    case " $LAUNCH " in
    *[\ /]srun\ *)
        # srun does not take it from the job by itself; of a heterogeneous job, that of the first part is everyone's.
        export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_PER_TASK_HET_GROUP_0:-1}}"
        ;;
    *)
        [ "${SLURM_HET_SIZE:-1}" = 1 ] || finish 2 'mpirun starts the ranks of the first part of a heterogeneous job only: set \
LAUNCH, to srun --het-group=0,1 and so on'
        # Of one task each. mpirun starts one daemon on each node, by srun, and the ranks share what that is given.
        unset SRUN_CPUS_PER_TASK SLURM_NTASKS_PER_GPU SLURM_EXACT SLURM_EXCLUSIVE
        case ${SLURM_GPUS_PER_TASK:+$SLURM_TASKS_PER_NODE} in
        *[!0-9]*) say 'with --gpus-per-task, mpirun lets all ranks of a node see the GPUs of one: use --gres instead, or srun' ;;
        esac
        ;;
    esac
}

requeue() {
    patiently scontrol requeue "$job"
}

after_end() { # STATUS
    state=$(patiently squeue --noheader --jobs="$job" --format=%T)
    case $state in
    RUNNING*) ;; # in the grace before a preemption: SLURM does not requeue what ends by itself in it
    *)
        say "ended by SLURM, with $1"
        note "=== exit status $1"
        exit "$1"
        ;;
    esac
}
