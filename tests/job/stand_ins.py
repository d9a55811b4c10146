"""Stand-ins for PBS, LSF and Flux, which do as their manuals say: they number jobs, keep a queue, run it in turn."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

JOBS = Path(__file__).parents[2] / "jobs"

QUEUE = """\
variables="FEDHPC_ARRAY=$FEDHPC_ARRAY FEDHPC_JOB_FILE=$FEDHPC_JOB_FILE FEDHPC_TASK=$FEDHPC_TASK"
enqueue() { # NUMBER FILE FIRST
    printf '%s\\t%s\\t%s\\t%s\\n' "$1" "$2" "$3" "$variables" >>queue
}
new_number() {
    number=$(($(cat number 2>/dev/null) + 1))
    echo $number >number
}
echo "${0##*/} $*" >>asked
"""
PROGRAMS = {
    "pbs": {
        "qsub": """
            for file; do
                case $file in FEDHPC_FIRST_JOB=*) first=${file#*=} first=${first%%,*} ;; esac
            done
            case $* in *FEDHPC_ARRAY,FEDHPC_JOB_FILE*) ;; *) variables= ;; esac
            new_number
            case $* in
            *-J*)
                tasks=$(echo "$*" | sed 's/.*-J 1-\\([0-9]*\\).*/\\1/')
                for task in $(seq $tasks); do enqueue "$number[$task].server" "$file" ""; done
                echo "$number[].server"
                ;;
            *)
                enqueue $number.server "$file" "$first"
                echo $number.server
                ;;
            esac""",
        # qrerun(1B): "PBS Manager or Operator privilege is required to use this command."
        "qrerun": '[ -e manager ] && enqueue "$1" job "" || { echo "qrerun: Unauthorized Request  $1" >&2; exit 159; }',
        "pbs_tmrsh": "",
    },
    "lsf": {
        "bsub": """
            new_number
            cat >job.$number
            tasks=$(echo "$*" | sed -n 's/.*\\[1-\\([0-9]*\\)\\].*/\\1/p')
            for task in $(seq ${tasks:-0}); do enqueue "$number[$task]" job.$number ""; done
            [ -n "$tasks" ] || enqueue $number job.$number ""
            echo "Job <$number> is submitted to queue <normal>.\"""",
        "brequeue": 'enqueue "$1" "job.${1%%\\[*}" ""; echo "Job <$1> is being requeued"',
        "blaunch": "",
    },
    "flux": {
        "flux": """
            for file; do :; done
            case $* in
            *batch*)
                new_number
                enqueue f$number "$file" "$FEDHPC_FIRST_JOB"
                echo f$number
                ;;
            *resource*) printf '8\\n0\\n0\\n' ;;
            *--count*) wc -l <nodes ;;
            *--expand*) echo $(cat nodes) ;;
            esac""",
    },
    "none": {},
}
FEDHPC = f"""\
#!/bin/bash
# Ends with the first exit status of the file `statuses`, and removes it from there; `wait` waits for a request to stop.
# As `fedhpc sweep --cell`, it prints a log and, as what is to be run, its own arguments.
[ "$1" != sweep ] || {{ printf '%s\\n' "logs/cell${{!#}}.log" "$@"; exit; }}
read -r status rest <statuses
echo "$rest" >statuses
echo "${{FEDHPC_RESTARTS:-none}}" >>restarts
[ "$status" = 213 ] || touch "$FEDHPC_STARTED"
[ "$status" != wait ] || exec {sys.executable} -I -S -c '
import os, signal, time
signal.signal(signal.SIGUSR1, lambda *_: (open(os.environ["FEDHPC_TRAINED"], "w"), os._exit(75)))
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])
open("waiting", "w")
while True:
    time.sleep(0.02)'
[ "$status" != early ] || exit 75
[ "$status" != 75 ] || touch "$FEDHPC_TRAINED"
[ "$status" != 0 ] || touch "$FEDHPC_FINISHED"
exit "$status"
"""


class StandIn:
    """A scheduler in a folder, where jobs are submitted and run.

    Args:
        key: pbs, lsf, flux or none.
    """

    def __init__(self, folder, key):
        self.folder, self.key = folder, key
        self.output = ""
        (folder / "jobs").symlink_to(JOBS)
        for name, script in {**PROGRAMS[key], "fedhpc": None}.items():
            path = folder / "bin" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(FEDHPC if script is None else f"#!/bin/sh\n{QUEUE}{script}\n")
            path.chmod(0o755)
        (folder / "nodes").write_text("n1\n")
        self.path = f"{folder}/bin:{os.environ['PATH']}"
        self.variables = {"PATH": self.path, "HOME": str(folder), "LAUNCH": "env", "FEDHPC": f"{folder}/bin/fedhpc"}
        self.variables["MAX_FAILURES"] = "1"

    def asked(self):
        """What its programs were called with, in lines."""
        path = self.folder / "asked"
        return path.read_text().splitlines() if path.exists() else []

    def next_job(self):
        """The first job of the queue, which leaves it: id, file, first job; None if there is none."""
        queue = self.folder / "queue"
        lines = queue.read_text().splitlines() if queue.exists() else []
        queue.write_text("".join(f"{line}\n" for line in lines[1:]))
        return lines[0].split("\t") if lines else None

    def start(self, job, **variables):
        """Run a job as the scheduler does; its process."""
        number, file, first, *variables_of_job = job
        array, _, index = number.partition("]")[0].partition("[")
        nodes = (self.folder / "nodes").read_text()
        own = {
            "pbs": {
                "PBS_JOBID": number,
                "PBS_NODEFILE": "nodes",
                "PBS_O_WORKDIR": str(self.folder),
                "PBS_ARRAY_INDEX": index,
            },
            "lsf": {"LSB_JOBID": array, "LSB_JOBINDEX": index or "0", "LSB_DJOB_HOSTFILE": "nodes"},
            "flux": {"FLUX_URI": "local:///flux", "FLUX_ENCLOSING_ID": number},
            "none": {},
        }[self.key]
        if self.key == "lsf":
            own["LSB_DJOB_NUMPROC"] = str(len(nodes.split()))
        own = {name: value for name, value in own.items() if value}
        for name, value in (pair.split("=", 1) for pair in " ".join(variables_of_job).split()):
            own |= {name: value} if value else {}
        if first:
            own["FEDHPC_FIRST_JOB"] = first
        return subprocess.Popen(
            ["env", "--default-signal=INT", "bash", file],
            cwd=self.folder,
            env={**self.variables, **own, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run_all(self, **variables):
        """Run the jobs of the queue, and those that they put there; the exit statuses."""
        statuses = []
        while job := self.next_job():
            process = self.start(job, **variables)
            self.output += process.communicate(timeout=60)[0]
            statuses.append(process.returncode)
            assert len(statuses) < 9, self.output
        return statuses

    def signal_waiting(self, job, number):
        """Run a job, and send a signal to all its processes when it waits; its exit status."""
        process = self.start(job)
        deadline = time.monotonic() + 60
        while not (self.folder / "waiting").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.killpg(process.pid, number)
        self.output += process.communicate(timeout=60)[0]
        (self.folder / "waiting").unlink()
        return process.returncode


END_SIGNALS = {"pbs": signal.SIGTERM, "lsf": signal.SIGINT, "flux": signal.SIGHUP, "none": signal.SIGINT}
"""The first that a job gets when it is deleted, killed, cancelled: qdel(1B), bkill, the broker's for `flux cancel`."""
