"""A private SLURM: munged, slurmctld and one slurmd for each node, all in one folder, ended by process id."""

import os
import pwd
import shutil
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "setpriv")
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
NOT_INHERITED = ("SLURM", "SBATCH", "SRUN", "SCANCEL", "SQUEUE", "OMPI_", "PMIX_", "PRTE_", "PMI_")
KILL_WAIT_S = 10
"""Between SLURM's SIGTERM and SIGKILL. One that requeues a job waits for cred_expire, too."""

# No job accounting, no cgroups; ended jobs are not forgotten. More CPUs than the host has: 17 tasks fit on any.
CONF = """\
ClusterName=test
SlurmctldHost={host}({address})
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={socket},cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
GresTypes=gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
ReturnToService=2
MinJobAge=3600
KillWait={kill_wait}
MailProg=/bin/true
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr={address} Port={port} CPUs={cpus} RealMemory=100000\n"


def missing_program():
    """The name of one that is not installed; None if all are."""
    return next((name for name in PROGRAMS if shutil.which(name, path=PATH) is None), None)


class Cluster:
    """Usable after :meth:`start`; :meth:`stop` ends it in whatever state it is.

    Args:
        folder: an empty one.
        cpus: of each node. The first is named like the host, so that mpirun starts the ranks there by itself, and those
            of the other nodes by daemons, which srun starts.
    """

    def __init__(self, folder, cpus):
        self.folder = Path(folder)
        self.cpus = cpus
        self.conf = self.folder / "slurm.conf"
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith(NOT_INHERITED)},
            "PATH": PATH,
            "SLURM_CONF": str(self.conf),
        }
        self.daemons = []

    def start(self):
        nodes = self.nodes()
        for name in ("state", "munge", *(f"spool.{node}" for node in nodes)):
            (self.folder / name).mkdir(mode=0o755)
        key, munge_socket = self.folder / "munge/key", self.folder / "munge/socket"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        user = pwd.getpwuid(os.geteuid()).pw_name
        controller, *ports = free_ports(1 + len(nodes))
        conf = ""
        for (node, (host, address)), port, cpus in zip(nodes.items(), ports, self.cpus, strict=True):
            conf = conf or CONF.format(
                host=host, address=address, user=user, port=controller, socket=munge_socket, folder=self.folder,
                kill_wait=KILL_WAIT_S,
            )  # fmt: skip
            conf += NODE.format(name=node, host=host, address=address, port=port, cpus=cpus)
        self.conf.write_text(conf)
        files = [f"--key-file={key}", f"--socket={munge_socket}"]
        files += [f"--{name}-file={self.folder / 'munge' / name}" for name in ("pid", "log", "seed")]
        first = next(iter(nodes))
        self._spawn(first, "munged", "--foreground", "--force", "--num-threads=2", *files)
        self._wait_until(munge_socket.is_socket)
        self._spawn(first, "slurmctld", "-D", "-f", str(self.conf))
        for node in nodes:
            self._spawn(node, "slurmd", "-D", "-N", node, "-f", str(self.conf))
        idle = ["sinfo", "--noheader", "--Node", "--states=idle", "--format=%N"]
        self._wait_until(lambda: len(self.run(*idle, check=False).stdout.split()) == len(nodes))

    def nodes(self):
        """Node -> the host that it is on, and its address."""
        host = socket.gethostname().partition(".")[0]
        names = [host, *(f"node{number}" for number in range(2, len(self.cpus) + 1))]
        return dict.fromkeys(names, (host, "127.0.0.1"))

    def on(self, node, command, cwd=None):
        """What runs a command on a node; `cwd` as far as that does not go without saying."""
        return command

    def stop(self):
        if self.daemons:
            self.run("scancel", "--user", pwd.getpwuid(os.geteuid()).pw_name, check=False)
            deadline = time.monotonic() + KILL_WAIT_S + 5
            while self.run("squeue", "--noheader", check=False).stdout and time.monotonic() < deadline:
                time.sleep(0.5)
        for daemon in reversed(self.daemons):
            daemon.terminate()
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for pid in self.processes():
            with suppress(ProcessLookupError):  # that ends with another one
                os.kill(pid, 9)

    def run(self, *command, cwd=None, check=True, **variables):
        """A command of this cluster; the completed process, outputs as text."""
        environment = self.environment | {key: str(value) for key, value in variables.items()}
        done = subprocess.run(
            self.on(next(iter(self.nodes())), [str(part) for part in command], cwd),
            capture_output=True,
            text=True,
            timeout=120,
            env=environment,
            cwd=cwd,
            check=False,
        )
        assert not check or done.returncode == 0, f"{command}: {done.stderr}"
        return done

    def submit(self, folder, *arguments, **variables):
        """Sbatch in a folder; the job's number. The output goes to NUMBER.out there."""
        return self.run("sbatch", "--parsable", "--output=%j.out", *arguments, cwd=folder, **variables).stdout.strip()

    def job(self, number):
        """What SLURM knows about a job."""
        shown = self.run("scontrol", "show", "job", "--oneliner", number).stdout
        return dict(field.partition("=")[::2] for field in shown.split())

    def ended(self, number, timeout_s=300):
        """Wait until a job has ended for good; what SLURM knows about it then."""
        deadline = time.monotonic() + timeout_s
        while (job := self.job(number))["JobState"] in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED"):
            assert time.monotonic() < deadline, f"job {number} did not end: {job}"
            time.sleep(0.5)
        return job

    def processes(self):
        """Numbers of all processes that know this cluster: what it started, and what that started."""
        mark = f"SLURM_CONF={self.conf}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdecimal() and mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:  # ended, or another user's
                continue
        return found

    def _spawn(self, node, program, *arguments):
        with (self.folder / f"{program}.{len(self.daemons)}.out").open("w") as output:
            daemon = subprocess.Popen(
                # It ends with this process, also when that is killed.
                ["setpriv", "--pdeathsig", "TERM", *self.on(node, [shutil.which(program, path=PATH), *arguments])],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self.daemons.append(daemon)

    def _wait_until(self, ready, timeout_s=30):
        deadline = time.monotonic() + timeout_s
        while not ready():
            logs = "\n".join(f"{file.name}:\n{file.read_text()[-2000:]}" for file in self.folder.glob("*.out"))
            assert time.monotonic() < deadline, f"the cluster did not come up\n{logs}"
            time.sleep(0.1)


def free_ports(count):
    """Ports that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
