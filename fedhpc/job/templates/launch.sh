# shellcheck shell=bash
# Runs fedhpc on the ranks of this SLURM job, stops it in time, and lets SLURM run the job again while that is of use.
# Job files source it with the arguments of `fedhpc run`, in a checkout from its top folder:
#   . jobs/launch.sh CONFIG [--set KEY.SUB=VALUE ...]
#
# From the environment, or set in the job file before that line:
#   LAUNCH          what starts the ranks. Default: .venv/bin/mpirun -np $SLURM_NTASKS; of a package that pip has
#                   installed, its mpirun.sh instead. Others:
#                     srun --mpi=pmix --kill-on-bad-exit=1     Open MPI, where SLURM has that plug-in
#                     srun --mpi=pmi2 --kill-on-bad-exit=1     MPICH and its relatives, the same
#                     mpirun -np $SLURM_NTASKS                 a module's MPI, loaded before, and before `make`
#   FEDHPC          the command. Default: .venv/bin/fedhpc
#   MAX_FAILURES    so often a job that failed is run again. Default: 3. Preemptions do not count, nor stops
#                   after something was trained.
#   FEDHPC_REQUEUE  no: SLURM does not run this job again, the next of a chain goes on (jobs/chain.sh).
#   CELL_LOG        of a cell of an experiment: what `fedhpc sweep` reads of its beginning and end (jobs/sweep.slurm).

templates=${BASH_SOURCE[0]%/*}
set +e +u +o pipefail # whatever the job file works under
IFS=$' \t\n'

say() {
    echo "fedhpc job: $*"
}

patiently() { # COMMAND ...
    for pause in 5 20 0; do # the daemon may be too busy to answer
        "$@" && return
        sleep $pause
    done
    return 1
}

note() { # LINE ...
    [ -z "${CELL_LOG:-}" ] || { mkdir -p "${CELL_LOG%/*}" && printf '%s\n' "$@" >>"$CELL_LOG"; }
}

finish() { # STATUS MESSAGE
    say "$2"
    note "=== exit status $1"
    rm -f "$failures"
    exit "$1"
}

run_again() { # STATUS MESSAGE
    trap '' TERM # which ends the job, and would end scontrol before it has its answer
    if [ "${FEDHPC_REQUEUE:-yes}" = no ]; then
        finish "$1" "$2; the next job of the chain goes on"
    elif ! patiently scontrol requeue "$job"; then
        finish "$1" "$2; SLURM does not requeue it: submit it again to go on, or several at once with $templates/chain.sh"
    fi
    say "$2; requeued"
    exit "$1"
}

# shellcheck disable=SC2317 # called by the traps
ask_to_stop() { # SIGNAL
    say "SIG$1: asking the ranks to stop"
    stops=$((stops + 1))
    [ -z "$launcher" ] || kill -USR1 "$launcher" 2>/dev/null
}

launcher='' stops=0 terminated=''
trap 'ask_to_stop USR1' USR1
trap 'ask_to_stop USR2' USR2
trap 'terminated=yes; ask_to_stop TERM' TERM

unset "${!SQUEUE_@}" SLURM_CLUSTERS # the user's settings could hide the job from squeue
# A task of an array has a number of its own, but by that of the last task SLURM would take the whole array.
job=$(squeue --noheader --states=all --jobs="$SLURM_JOB_ID" --format='%A %i' | sed -n "s/^$SLURM_JOB_ID \(.*_.*\)/\1/p")
[ "$SLURM_JOB_ID" != "${SLURM_ARRAY_JOB_ID:-}" ] || job=${job:-${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
failures=fedhpc-$job.failures
export FEDHPC_STARTED=$PWD/fedhpc-$job.started   # made by a run whose ranks have found each other
export FEDHPC_TRAINED=$PWD/fedhpc-$job.trained   # made by a run that is stopped after it has trained something
export FEDHPC_FINISHED=$PWD/fedhpc-$job.finished # made by the run that reaches its end
rm -f "$FEDHPC_STARTED" "$FEDHPC_TRAINED" "$FEDHPC_FINISHED"

# SLURM ends a job by SIGTERM to all its processes. Open MPI's mpirun and daemons would kill the ranks 0.2 s later, so
# they must not see it. Nor must a rank die of a signal that comes while it starts: it stays pending until then.
if env --block-signal=TERM true 2>/dev/null; then
    deaf='env --block-signal=TERM'
    patient='env --block-signal=TERM,USR1,USR2'
    export PRTE_MCA_prte_launch_agent="${PRTE_MCA_prte_launch_agent:-$deaf prted}"
else
    deaf='' patient=''
    say "this system's env cannot block signals: when SLURM ends the job, the ranks stop without a last checkpoint"
fi
[ -n "${LAUNCH:-${SLURM_NTASKS:-}}" ] || finish 2 'the job does not say how many tasks: ask for --ntasks'
case $templates in
*/fedhpc/job/templates) mpirun="sh $templates/mpirun.sh" ;;
*) mpirun=.venv/bin/mpirun ;;
esac
LAUNCH=${LAUNCH:-$mpirun -np $SLURM_NTASKS}
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

say "job $job, run $((${SLURM_RESTART_COUNT:-0} + 1)), $(date '+%F %T'), $LAUNCH: fedhpc run $*"
note "=== fedhpc run $*" "in SLURM job $job"
# shellcheck disable=SC2086 # several words each
$deaf $LAUNCH $patient ${FEDHPC:-.venv/bin/fedhpc} run "$@" &
launcher=$!
[ $stops = 0 ] || kill -USR1 "$launcher" 2>/dev/null
while # a signal ends `wait` before the launcher ends
    seen=$stops
    wait "$launcher"
    status=$?
    [ "$stops" != "$seen" ]
do :; done

started='' trained='' finished=''
! rm "$FEDHPC_STARTED" 2>/dev/null || started=yes
! rm "$FEDHPC_TRAINED" 2>/dev/null || trained=yes
! rm "$FEDHPC_FINISHED" 2>/dev/null || finished=yes
if [ $status = 0 ] && [ -z "$finished" ]; then
    say 'the launcher lost the ranks' # Open MPI's mpirun ends with 0 when it loses a daemon on another node
    status=1
fi
[ $status != 138 ] || [ "$stops" = 0 ] || status=75 # the signal came before the launcher was ready for it

case $status in
0) finish 0 'done' ;;
2) finish 2 'ended with 2, which another run would not mend' ;;
esac
# Of a run that was begun before, a node may be at fault that lacks a file system.
if [ -z "$started" ] && [ "$stops" = 0 ] && [ "${SLURM_RESTART_COUNT:-0}" = 0 ]; then
    finish $status "ended with $status before the ranks had found each other, which another run would not mend: see above, \
and \"Starting the ranks\" in docs/slurm.md"
fi
if [ -n "$terminated" ]; then
    state=$(patiently squeue --noheader --jobs="$job" --format=%T)
    case $state in
    RUNNING*) ;; # in the grace before a preemption: SLURM does not requeue what ends by itself in it
    *)
        say "ended by SLURM, with $status"
        note "=== exit status $status"
        exit $status
        ;;
    esac
fi
what="failed with $status"
if [ $status = 75 ]; then
    [ -z "$trained$terminated" ] || run_again 75 'stopped'
    what='stopped before it trained anything (is the time limit too short?)' # for ever, if nobody counted
fi

count=$(($(cat "$failures" 2>/dev/null) + 1))
if [ $count -gt "${MAX_FAILURES:-3}" ]; then
    finish $status "$what for the $count. time, not run again"
fi
# Over a quota, some file systems say so only here.
echo $count | dd of="$failures" conv=fsync status=none ||
    finish $status "$what, and there is no room to count failures: not run again"
run_again $status "$what"
