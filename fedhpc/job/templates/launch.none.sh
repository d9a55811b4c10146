# shellcheck shell=bash disable=SC2034
# What launch.sh does otherwise for each scheduler, here without one: on this machine.

scheduler='the machine' ends='INT TERM' how_many='set FEDHPC_RANKS'
trap 'terminated=yes; ask_to_stop USR1' USR1 # nobody but the user asks
trap 'terminated=yes; ask_to_stop USR2' USR2
job=$$
slots=
ranks=${FEDHPC_RANKS:-}
count_restarts

prepare_launch() {
    :
}

requeue() { # MESSAGE
    [ -n "${FEDHPC_JOB_FILE:-}" ] || return
    say "$1; run again"
    # shellcheck disable=SC2086
    trap - $ends # what is ignored now, the next shell could not hear
    exec bash "$FEDHPC_JOB_FILE"
}

after_end() { # STATUS
    finish "$1" "ended by a signal, with $1"
}
