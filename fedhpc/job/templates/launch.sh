# shellcheck shell=bash
# Runs fedhpc on the ranks of this batch job, stops it in time, and has the job run again while that is of use.
# Job files source it with the arguments of `fedhpc run`, in a checkout from its top folder:
#   . jobs/launch.sh CONFIG [--set KEY.SUB=VALUE ...]
# What differs from scheduler to scheduler is in launch.slurm.sh, launch.pbs.sh, launch.lsf.sh, launch.flux.sh and, without
# any, launch.none.sh. Each sets
#   scheduler, how_many   its name, and how a job says how many ranks it is for
#   ends                  the signals that end a job, in bash's names
#   job, ranks, restarts  the job's id, how many ranks to start, how often the job was run before
#   slots                 how many ranks the job has room for, where known
# and defines prepare_launch, requeue, and after_end: what becomes of a job that was ended by one of these signals.
#
# From the environment, or set in the job file before that line:
#   LAUNCH          what starts the ranks. Default: .venv/bin/mpirun -np RANKS; of a package that pip has installed, its
#                   mpirun.sh instead. Others:
#                     srun --mpi=pmix --kill-on-bad-exit=1     Open MPI, where SLURM has that plug-in
#                     srun --mpi=pmi2 --kill-on-bad-exit=1     MPICH and its relatives, the same
#                     flux run --ntasks=RANKS                  MPICH; Open MPI with -o pmi=pmix, where Flux has that plug-in
#                     mpirun -np RANKS                         a module's MPI, loaded before, and before `make`
#   FEDHPC          the command. Default: .venv/bin/fedhpc
#   FEDHPC_RANKS    how many ranks, but under SLURM, which is asked for tasks. Default: as many as the job has room for
#   MAX_FAILURES    so often a job that failed is run again. Default: 3. Preemptions do not count, nor stops
#                   after something was trained.
#   FEDHPC_REQUEUE  no: this job is not run again, the next of a chain goes on (fedhpc submit --chain, jobs/chain.sh).
#   FEDHPC_SCHEDULER slurm, pbs, lsf, flux or none, whose job this is. Default: the one whose variables are set
#   FEDHPC_JOB_FILE the job file, which is submitted once more where the scheduler runs no job again.
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
    rm -f "$failures" "$runs"
    exit "$1"
}

run_again() { # STATUS MESSAGE
    # shellcheck disable=SC2086
    trap '' $ends # which end the job, and would end scontrol before it has its answer
    if [ "${FEDHPC_REQUEUE:-yes}" = no ]; then
        finish "$1" "$2; the next job of the chain goes on"
    elif ! requeue "$2"; then
        again="submit it again to go on, or several at once with $several"
        [ -z "${CELL_LOG:-}" ] || again="when the array has ended, the same fedhpc sweep --submit goes on"
        finish "$1" "$2; $scheduler does not requeue it: $again"
    fi
    say "$2; $again"
    exit "$1"
}

# shellcheck disable=SC2317 # called by the traps
ask_to_stop() { # SIGNAL
    say "SIG$1: asking the ranks to stop"
    stops=$((stops + 1))
    [ -z "$launcher" ] || pass_on
}

pass_on() {
    kill -USR1 "$launcher" 2>/dev/null
}

# How often this job was run before, where the scheduler does not tell; a job that goes on from another one counts on.
count_restarts() {
    first=${FEDHPC_FIRST_JOB:-$job}
    runs=fedhpc-$first.runs
    restarts=$(($(cat "$runs" 2>/dev/null)))
    echo $((restarts + 1)) >"$runs"
    export FEDHPC_RESTARTS=$restarts # for the run's lock
}

# Where there are several nodes, any MPI's launcher finds them, and starts its daemons on them by the scheduler's means.
use_hosts() { # FILE COMMAND
    [ "$(sort -u "$1" | wc -l)" -gt 1 ] || return 0
    export FEDHPC_HOSTS=$1 PRTE_MCA_prte_default_hostfile=$1 OMPI_MCA_orte_default_hostfile=$1 HYDRA_HOST_FILE=$1
    ! command -v "$2" >/dev/null ||
        export PRTE_MCA_plm_ssh_agent=$2 OMPI_MCA_plm_rsh_agent=$2 HYDRA_LAUNCHER=ssh HYDRA_LAUNCHER_EXEC=$2
}

launcher='' stops=0 terminated='' first='' runs='' again=requeued several='fedhpc submit --chain'
trap 'ask_to_stop USR1' USR1
trap 'ask_to_stop USR2' USR2
trap 'terminated=yes; ask_to_stop TERM' TERM

# Older versions of Flux do not set it.
[ -z "${FLUX_URI:-}" ] || export FLUX_ENCLOSING_ID="${FLUX_ENCLOSING_ID:-$(flux getattr jobid 2>/dev/null)}"
# A job of one scheduler can run within a job of another one, whose variables it sees.
case 1 in
"${FEDHPC_SCHEDULER:+1}") part=$FEDHPC_SCHEDULER ;;
"${FLUX_ENCLOSING_ID:+1}") part=flux ;;
"${SLURM_JOB_ID:+1}") part=slurm ;;
"${PBS_JOBID:+1}") part=pbs ;;
"${LSB_JOBID:+1}") part=lsf ;;
*) part=none ;;
esac
export FEDHPC_SCHEDULER=$part
# shellcheck disable=SC1090
. "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/launch.$part.sh"
for signal in $ends; do
    # shellcheck disable=SC2064
    trap "terminated=yes; ask_to_stop $signal" "$signal"
done

failures=fedhpc-${first:-$job}.failures
export FEDHPC_STARTED=$PWD/fedhpc-$job.started   # made by a run whose ranks have found each other
export FEDHPC_TRAINED=$PWD/fedhpc-$job.trained   # made by a run that is stopped after it has trained something
export FEDHPC_FINISHED=$PWD/fedhpc-$job.finished # made by the run that reaches its end
rm -f "$FEDHPC_STARTED" "$FEDHPC_TRAINED" "$FEDHPC_FINISHED"

# A job is ended by a signal to all its processes. Open MPI's mpirun and daemons would kill the ranks 0.2 s later, so
# they must not see it. Nor must a rank die of a signal that comes while it starts: it stays pending until then.
blocked=${ends// /,}
if env --block-signal="$blocked" true 2>/dev/null; then
    deaf="env --block-signal=$blocked"
    patient="env --block-signal=$blocked,USR1,USR2"
    export PRTE_MCA_prte_launch_agent="${PRTE_MCA_prte_launch_agent:-$deaf prted}"
else
    deaf='' patient=''
    say "this system's env cannot block signals: when $scheduler ends the job, the ranks stop without a last checkpoint"
fi
[ -n "${LAUNCH:-$ranks}" ] || finish 2 "the job does not say how many tasks: $how_many"
[ -n "${LAUNCH:-}" ] || [ "$ranks" -le "${slots:-$ranks}" ] ||
    finish 2 "$ranks ranks are asked for (FEDHPC_RANKS), but the job has room for $slots: $how_many"
case $templates in
*/fedhpc/job/templates) mpirun="sh $templates/mpirun.sh" ;;
*) mpirun=.venv/bin/mpirun ;;
esac
LAUNCH=${LAUNCH:-$mpirun -np $ranks}
prepare_launch

say "job $job, run $((restarts + 1)), $(date '+%F %T'), $LAUNCH: fedhpc run $*"
note "=== fedhpc run $*" "in $scheduler job $job"
# shellcheck disable=SC2086 # several words each
$deaf $LAUNCH $patient ${FEDHPC:-.venv/bin/fedhpc} run "$@" &
launcher=$!
[ $stops = 0 ] || pass_on
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
if [ "$status" -lt 0 ]; then # bash loses it where the launcher ends while a signal is handled
    status=75
    [ -z "$finished" ] || status=0
fi
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
if [ -z "$started" ] && [ "$stops" = 0 ] && [ "$restarts" = 0 ]; then
    finish $status "ended with $status before the ranks had found each other, which another run would not mend: see above, \
and \"Starting the ranks\" in docs/slurm.md"
fi
[ -z "$terminated" ] || after_end $status
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
