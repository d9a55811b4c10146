# shellcheck shell=bash disable=SC2034
# What launch.sh does otherwise for each scheduler, here for IBM Spectrum LSF (bsub, brequeue).

scheduler=LSF ends='INT TERM' how_many='ask for more by -n, or for fewer ranks'
job=$LSB_JOBID
[ "${LSB_JOBINDEX:-0}" = 0 ] || job="$LSB_JOBID[$LSB_JOBINDEX]"
slots=$LSB_DJOB_NUMPROC
ranks=${FEDHPC_RANKS:-$slots}
count_restarts

prepare_launch() {
    use_hosts "$LSB_DJOB_HOSTFILE" blaunch # which starts what LSF knows of, and ends
}

requeue() {
    patiently brequeue "$job"
}

after_end() { # STATUS
    finish "$1" "ended by LSF, with $1"
}
