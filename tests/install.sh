#!/bin/sh
# Install SLURM's daemons, and the distribution's MPIs, for the tests: on Debian and Ubuntu, as root, if they are
# missing. Starts nothing.
set -eu
PATH=$PATH:/usr/sbin:/sbin
POLICY=/usr/sbin/policy-rc.d

give_up() {
    echo "no tests of SLURM, or of another MPI: $1"
    exit 0
}

for program in munged slurmctld slurmd sbatch mpirun.openmpi mpiexec.mpich; do
    command -v $program >/dev/null || missing="${missing:-} $program"
done
[ -n "${missing:-}" ] || exit 0
[ "$(id -u)" = 0 ] || give_up "missing$missing, and only root can install them"
command -v apt-get >/dev/null || give_up "missing$missing, and there is no apt-get to install them"

if [ ! -e $POLICY ]; then # apt starts what it installs, unless this says no
    trap 'rm -f $POLICY' EXIT
    printf '#!/bin/sh\nexit 101\n' >$POLICY
    chmod 755 $POLICY
fi
log=$(mktemp)
echo "installing SLURM, Open MPI and MPICH for the tests"
if { timeout 120 apt-get update && DEBIAN_FRONTEND=noninteractive timeout 300 apt-get install -y \
    --no-install-recommends munge slurmctld slurmd slurm-client slurm-wlm-basic-plugins \
    openmpi-bin mpich; } >"$log" 2>&1; then
    rm -f "$log"
else
    give_up "apt-get failed, see $log"
fi
