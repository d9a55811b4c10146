#!/bin/sh
# Install SLURM's daemons, and the distribution's MPIs, for the tests: on Debian and Ubuntu, as root, what is missing. MPIs
# only where there is none, whose mpiexec they would take the place of. Starts nothing.
set -eu
PATH=$PATH:/usr/sbin:/sbin
POLICY=/usr/sbin/policy-rc.d

give_up() {
    echo "not all tests: $1"
    exit 0
}

install() {
    echo "installing $* for the tests"
    DEBIAN_FRONTEND=noninteractive timeout 300 apt-get install -y --no-install-recommends "$@" >"$log" 2>&1 ||
        give_up "apt-get failed, see $log"
}

slurm='' mpis=''
for program in munged slurmctld slurmd sbatch; do
    command -v $program >/dev/null || slurm="$slurm $program"
done
command -v mpiexec >/dev/null || mpis=' mpirun.openmpi mpiexec.mpich'
[ -n "$slurm$mpis" ] || exit 0
[ "$(id -u)" = 0 ] || give_up "missing$slurm$mpis, and only root can install them"
command -v apt-get >/dev/null || give_up "missing$slurm$mpis, and there is no apt-get to install them"

if [ ! -e $POLICY ]; then # apt starts what it installs, unless this says no
    trap 'rm -f $POLICY' EXIT
    printf '#!/bin/sh\nexit 101\n' >$POLICY
    chmod 755 $POLICY
fi
log=$(mktemp)
timeout 120 apt-get update >"$log" 2>&1 || give_up "apt-get failed, see $log"
[ -z "$slurm" ] || install munge slurmctld slurmd slurm-client slurm-wlm-basic-plugins
[ -z "$mpis" ] || install openmpi-bin mpich
rm -f "$log"
