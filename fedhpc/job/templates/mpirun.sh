#!/bin/sh
# mpirun for one machine, or hosts that --host names, also as root and with more ranks than cores; `make` installs it as
# .venv/bin/mpirun. As it is, it calls the mpiexec beside FEDHPC, or else the one on PATH.
# In a job of SLURM, or on several nodes, the scheduler decides who goes where, and cores are not shared.
# Every setting can be overridden from the environment.
set -eu

if [ "$(id -u)" = 0 ]; then
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 PRTE_ALLOW_RUN_AS_ROOT=1 PRTE_ALLOW_RUN_AS_ROOT_CONFIRM=1
fi

# No rank is bound to a core of its own (Open MPI 5, then 4).
: "${PRTE_MCA_hwloc_default_binding_policy:=none}" "${OMPI_MCA_hwloc_base_binding_policy:=none}"
export PRTE_MCA_hwloc_default_binding_policy OMPI_MCA_hwloc_base_binding_policy

if [ -n "${SLURM_JOB_ID:-}${FEDHPC_HOSTS:-}" ]; then
    # Ranks in turn to the nodes, as their GPUs are spread, instead of filling one after the other (Open MPI 5, then 4).
    # Where SLURM has given the nodes different numbers of tasks, Open MPI 5 maps by node only some of the ranks.
    case ${SLURM_TASKS_PER_NODE:-} in
    *,*) mapping=slot ;;
    *) mapping=node ;;
    esac
    : "${PRTE_MCA_rmaps_default_mapping_policy:=$mapping}" "${PRTE_MCA_rmaps_default_ranking_policy:=node}"
    : "${OMPI_MCA_rmaps_base_mapping_policy:=node}"
    export PRTE_MCA_rmaps_default_mapping_policy PRTE_MCA_rmaps_default_ranking_policy OMPI_MCA_rmaps_base_mapping_policy
else
    # More ranks than cores; on several hosts as many as each has slots (without `slot` all would go to the first one).
    : "${PRTE_MCA_rmaps_default_mapping_policy:=slot:oversubscribe}" "${OMPI_MCA_rmaps_base_oversubscribe:=1}"
    export PRTE_MCA_rmaps_default_mapping_policy OMPI_MCA_rmaps_base_oversubscribe
    # The ranks find out that a host is lost, within exchange.timeout_s; an mpirun that does so first ends with 0.
    : "${PRTE_MCA_oob_tcp_keepalive_time:=0}"
    export PRTE_MCA_oob_tcp_keepalive_time
    # A waiting rank sleeps instead of taking a core from a working one.
    : "${OMPI_MCA_mpi_yield_when_idle:=1}" "${OMPI_MCA_threads_pthreads_yield_strategy:=nanosleep}"
    : "${OMPI_MCA_threads_pthreads_nanosleep_time:=100000}"
    export OMPI_MCA_mpi_yield_when_idle OMPI_MCA_threads_pthreads_yield_strategy OMPI_MCA_threads_pthreads_nanosleep_time
    : "${OPENBLAS_NUM_THREADS:=1}"
    export OPENBLAS_NUM_THREADS
fi

mpiexec='@MPIEXEC@'
case $mpiexec in
@*)
    mpiexec=${FEDHPC%/*}/mpiexec
    [ -x "$mpiexec" ] || mpiexec=mpiexec
    ;;
esac
exec "$mpiexec" "$@"
