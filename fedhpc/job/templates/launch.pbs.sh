# shellcheck shell=bash disable=SC2034
# What launch.sh does otherwise for each scheduler, here for PBS Professional and OpenPBS (qsub(1B), qrerun(1B)).

scheduler=PBS ends=TERM how_many='ask for more mpiprocs, or fewer ranks'
command -v qstat >/dev/null || export PATH="$PATH:${PBS_O_PATH:-}" # PBS's commands are where the job was submitted
job=$PBS_JOBID
slots=$(grep -c . "$PBS_NODEFILE") # a line for each of mpiprocs
ranks=${FEDHPC_RANKS:-$slots}
count_restarts

prepare_launch() {
    use_hosts "$PBS_NODEFILE" pbs_tmrsh # which starts what PBS knows of, and ends
}

requeue() { # qrerun is for managers and operators of PBS: the job file is submitted once more
    case ${FEDHPC_JOB_FILE:+$job} in
    '' | *\[*) qrerun "$job" ;; # one job of an array cannot be
    *)
        variables=FEDHPC_FIRST_JOB=$first${FEDHPC_ARRAY:+,FEDHPC_ARRAY,FEDHPC_JOB_FILE}
        again="goes on as job $(patiently qsub -W "depend=afterany:$job" -v "$variables" "$FEDHPC_JOB_FILE")"
        ;;
    esac
}

after_end() { # STATUS
    finish "$1" "ended by PBS, with $1"
}
