"""Hosts on one machine, made of namespaces, for ranks that share no memory and talk over links that can be cut.

Each has a network, a host name, processes, shared memory, /dev/shm, /tmp and a boot id of its own; other files are
everyone's, as on a cluster. A bridge joins them. Nothing of it is seen outside, and all of it ends with this process.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import uuid
from contextlib import suppress
from pathlib import Path

from fedhpc.job.environment import start_ticks

ROOT = Path(__file__).parents[2]
BESIDE_PYTHON = Path(sys.executable).parent
PROGRAMS = ("unshare", "nsenter", "setpriv", "ip", "tc")
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
NOT_INHERITED = ("SLURM", "SBATCH", "SRUN", "SCANCEL", "SQUEUE", "OMPI_", "PMIX_", "PRTE_", "PMI_", "TMP")
NAMESPACES = ("--net", "--uts", "--ipc", "--mount")
DIE_WITH_US = ("setpriv", "--pdeathsig", "KILL")
TRY = """\
set -e
ip link add bridge type bridge
ip link add node type veth
tc qdisc add dev node root tbf rate 1mbit burst 9k latency 1s
"""
START = """\
set -e
name=$1 own=$2 names=$3 boot=$4
shift 4
hostname "$name"
mount -t tmpfs tmpfs "$own"
chmod 1777 "$own"
for path; do # which the new /tmp would hide
    mkdir -p "$own/$path"
    mount --bind "/tmp/$path" "$own/$path"
done
mount --rbind "$own" /tmp
mount -t tmpfs tmpfs /dev/shm
mount --bind "$names" /etc/hosts
mount --bind "$boot" /proc/sys/kernel/random/boot_id
echo up
sleep infinity &
wait # and so takes in whatever loses its parent
"""
QUEUE = "50ms"
BURST_S = 0.001
"""What a shaped link may send at once, in seconds of its rate, but `SMALLEST_BURST` bytes at least."""
SMALLEST_BURST = 16_000
NETWORK, SUBNET = "network", "10.77.0"


def why_not():
    """Why there can be no such hosts here; None if there can."""
    if os.geteuid() != 0:
        return "emulated hosts: not root"
    if not (BESIDE_PYTHON / "mpiexec").exists():
        return "emulated hosts: no mpiexec beside this Python"
    for program in PROGRAMS:
        if shutil.which(program, path=PATH) is None:
            return f"emulated hosts: no {program}"
    command = ["unshare", *NAMESPACES, "--pid", "--fork", "--mount-proc", "sh", "-c", TRY]
    tried = subprocess.run(command, capture_output=True, text=True, env={"PATH": PATH}, check=False)
    return None if tried.returncode == 0 else f"emulated hosts: {tried.stderr.strip().splitlines()[-1]}"


class Hosts:
    """A context manager: node1 to nodeN, which see folders of /tmp only if they are `shared`.

    Args:
        folder: an empty one, of a short path.
        count: N.
        shared: folders that all of them must see, besides this one, the checkout and Python.
    """

    def __init__(self, folder, count, shared=()):
        self.folder = Path(folder).resolve()
        self.names = [f"node{number}" for number in range(1, count + 1)]
        self.addresses = {name: f"{SUBNET}.{number}" for number, name in enumerate(self.names, start=1)}
        self.environment = {key: value for key, value in os.environ.items() if not key.startswith(NOT_INHERITED)}
        self.environment |= {"PATH": PATH, "PYTHONPATH": str(ROOT)}
        self._shared = [self.folder, ROOT, Path(sys.prefix), Path(sys.base_prefix), *map(Path, shared)]
        self.entered = {}
        """Processes that mpirun has started on other hosts than its own -> when, in ticks; with all from before."""
        self._processes = {}
        """Host name, or that of the network between them -> the process that keeps its namespaces."""

    def __enter__(self):
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for process in self._processes.values():
            process.kill()
        for process in self._processes.values():
            process.wait()
        self._processes.clear()

    def command(self, host, *command, cwd=None):
        """What runs a command on a host, from outside."""
        pid = self._processes[host].pid
        namespaces = [*NAMESPACES, f"--pid=/proc/{pid}/ns/pid_for_children"]
        return ["nsenter", "--target", str(pid), *namespaces, "env", f"--chdir={cwd or '/'}", *map(str, command)]

    def run(self, host, *command, cwd=None, timeout_s=300, check=True, **variables):
        """Run a command on a host; the completed process, outputs as text."""
        done = subprocess.run(
            self.command(host, *command, cwd=cwd),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env=self.environment | {key: str(value) for key, value in variables.items()},
            check=False,
        )
        assert not check or done.returncode == 0, f"{command} on {host}: {done.stdout}{done.stderr}"
        return done

    def mpirun(self, slots, *arguments):
        """The command that starts ranks by jobs/mpirun.sh and this environment's MPI, to be run on the first host.

        Args:
            slots: ranks that each host takes, in their order.
            arguments: of mpirun.
        """
        agent = f"{sys.executable} -S {Path(__file__).parent / 'enter.py'} {self._address}"
        places = ",".join(f"{name}:{count}" for name, count in zip(self.names, slots, strict=True) if count)
        variables = [f"PRTE_MCA_plm_ssh_agent={agent}", f"FEDHPC={BESIDE_PYTHON / 'fedhpc'}"]
        return ["env", *variables, "sh", str(ROOT / "jobs/mpirun.sh"), "--host", places, *map(str, arguments)]

    def spread(self, num_ranks, *arguments):
        """The same, for so many ranks that are dealt out to the hosts evenly."""
        counts = [len(range(place, num_ranks, len(self.names))) for place in range(len(self.names))]
        return self.mpirun(counts, "-np", num_ranks, *arguments)

    def cut(self, host):
        """Pull a host's cable."""
        self._configure(NETWORK, "ip", f"link set {host} down")

    def restore(self, host):
        """Put it back."""
        self._configure(NETWORK, "ip", f"link set {host} up")

    def shape(self, host, mbit):
        """Let a host's link carry so many megabits a second each way."""
        burst = max(SMALLEST_BURST, round(BURST_S * mbit * 1e6 / 8))
        limits = f"tbf rate {mbit}mbit burst {burst}b latency {QUEUE}"
        for place, device in ((host, "eth0"), (NETWORK, host)):
            self._configure(place, "tc", f"qdisc replace dev {device} root {limits}")

    def _start(self):
        names = self.folder / "names"
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in self.addresses.items())]
        names.write_text("\n".join(lines) + "\n")
        self._keep(NETWORK, "unshare", "--net", "sh", "-c", "echo up; exec sleep infinity")
        self._configure(NETWORK, "ip", "link add bridge type bridge\nlink set bridge up")
        hidden = [path.relative_to("/tmp") for path in self._shared if path.is_relative_to("/tmp")]
        for name in self.names:
            own, boot = self.folder / f"tmp.{name}", self.folder / f"boot.{name}"
            own.mkdir()
            boot.write_text(f"{uuid.uuid4()}\n")
            unshare = ["unshare", *NAMESPACES, "--pid", "--fork", "--kill-child", "--mount-proc"]
            self._keep(name, *unshare, "sh", "-c", START, "sh", name, own, names, boot, *hidden)
            self._configure(
                NETWORK,
                "ip",
                f"link add {name} type veth peer name eth0 netns {self._processes[name].pid}\n"
                f"link set {name} master bridge up",
            )
            ours = f"link set lo up\naddress add {self.addresses[name]}/24 dev eth0\nlink set eth0 up"
            self._configure(name, "ip", ours)
        self._listen()

    def _keep(self, name, *command):
        process = subprocess.Popen(
            [*DIE_WITH_US, *map(str, command)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            env=self.environment,
            start_new_session=True,
        )
        self._processes[name] = process
        assert process.stdout.readline() == b"up\n", f"{name} did not come up"

    def _configure(self, place, program, commands):
        command = ["nsenter", "--target", str(self._processes[place].pid), "--net", program, "-batch", "-"]
        subprocess.run(command, input=commands, text=True, env=self.environment, check=True)

    def _listen(self):
        self._address = self.folder / "enter"
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(self._address))
        listener.listen()
        threading.Thread(target=self._answer_all, args=(listener,), daemon=True).start()

    def _answer_all(self, listener):
        while True:
            threading.Thread(target=self._answer, args=listener.accept()[:1], daemon=True).start()

    def _answer(self, connection):
        with connection:
            request, files, _, _ = socket.recv_fds(connection, 1 << 16, 3)
            host, command = json.loads(request)
            stdin, stdout, stderr = files
            process = subprocess.Popen(
                self.command(host, "sh", "-c", command),
                stdin=stdin, stdout=stdout, stderr=stderr, env=self.environment, start_new_session=True,
            )  # fmt: skip
            self.entered[process.pid] = start_ticks(process.pid)
            for file in files:
                os.close(file)
            with suppress(BrokenPipeError):  # nobody waits for it any more
                connection.sendall(str(process.wait() & 0xFF).encode())
