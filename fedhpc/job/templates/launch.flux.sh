# shellcheck shell=bash disable=SC2034
# What launch.sh does otherwise for each scheduler, here for Flux (flux-batch(1), flux-environment(7), flux-hostlist(1)).

scheduler=Flux ends='HUP TERM' how_many='set FEDHPC_RANKS, to the job'\''s cores at most' # the script is ended by SIGHUP
job=$FLUX_ENCLOSING_ID
slots=$(flux resource list --no-header --format='{ncores}' | awk '{ cores += $1 } END { print cores }')
ranks=${FEDHPC_RANKS:-}
count_restarts

prepare_launch() {
    case " $LAUNCH " in
    *[\ /]flux\ run\ *)
        deaf=$patient # it would die of what is meant for the ranks, and leave them alone
        pass_on() {
            flux job killall --force --signal=USR1
        }
        return
        ;;
    esac
    nodes=$(flux hostlist --count instance)
    [ "$nodes" -gt 1 ] || return 0
    hosts=$(mktemp) # a line for each rank
    trap 'rm -f "$hosts"' EXIT
    for host in $(flux hostlist --expand instance); do
        for ((i = 0; i < ranks; i += nodes)); do echo "$host"; done
    done >"$hosts"
    use_hosts "$hosts" ssh
}

requeue() { # Flux runs no job again: the job file is submitted once more, to the instance that this job is one of
    [ -n "${FEDHPC_JOB_FILE:-}" ] || return
    again="goes on as job $(patiently env -u FLUX_ENCLOSING_ID FEDHPC_FIRST_JOB="$first" \
        flux --parent batch --dependency="afterany:$job" "$FEDHPC_JOB_FILE")"
}

after_end() { # STATUS
    finish "$1" "ended by Flux, with $1"
}
