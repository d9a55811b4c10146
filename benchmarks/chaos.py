"""A fault campaign: ranks of real runs are struck at random moments; every run must end with the undisturbed bits.

    python benchmarks/chaos.py --out runs/chaos [--runs 64] [--seed 1] [--ranks 4] [--only RUN ...] [--hosts]

Each run is started under mpirun; a random rank gets SIGKILL, SIGTERM, SIGUSR1 or SIGSTOP during start-up, during the
rounds, while a checkpoint is written or near the end. The run must end by itself, with the right status and no process
left, and go on to the end on another number of ranks; some are struck again on the way. With an MPI that has ULFM, some
runs must survive the loss of a rank without a new start. With `--hosts`, as root, the ranks are spread over two
emulated hosts (tests/hosts/hosts.py). The table also goes to OUT/chaos.json with all details; of a run with anything
wrong the folder stays. Exit status 1 if there is one.
"""

import argparse
import json
import random
import re
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import yaml

from fedhpc.checkpoint.files import verify
from fedhpc.checkpoint.store import Checkpoints
from fedhpc.errors import EXIT_STOPPED, EXIT_USER_ERROR, CheckpointError
from fedhpc.job.run_files import RunFiles

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests/mpi"), str(ROOT / "tests/hosts")]
import tiny  # noqa: E402
from hosts import Hosts, why_not  # noqa: E402
from launch import WITH_ULFM, has_ulfm  # noqa: E402
from strike import CheckpointFiles, Job, catches  # noqa: E402

ROUNDS = 60
TIMEOUT_S = 10.0
"""`exchange.timeout_s` where a rank will hang. On a busy machine the ranks' set-ups are nearly that far apart."""
SETTINGS = {
    "federation": {"rounds": ROUNDS, "num_devices": tiny.NUM_DEVICES, "sample_rate": 0.5},
    "device": {"epochs": 1, "batch_size": 8, "learning_rate": 0.05, "reset_moments": False},
    "checkpoint": {"every": 1},
    "evaluate": {"every": 20},
    "trace": False,
}
LIMIT_S = 90.0
"""From a strike to the end of mpirun: the timeout, 15 s for MPI_Abort, and a start-up on a busy machine."""
START_LIMIT_S = 180.0
"""For a start that nobody disturbs."""
MAX_RESTARTS = 3
STRUCK_TWICE = 0.15
"""Share of the runs that are struck in their second start, too."""
STOPS = ("SIGTERM", "SIGUSR1")
KINDS = ("SIGKILL", "SIGSTOP", *STOPS)
MOMENTS = {"rounds": 6, "checkpoint": 4, "start-up": 2, "end": 2}
"""How often each is tried with each kind of signal, of 64 runs."""
SURVIVED = {"rounds": 5, "checkpoint": 3}
"""The same for SIGKILL under ULFM."""
SAME_RECORDS = ("round", "devices", "examples", "steps", "loss", "accuracy", "accuracy_global", "update_norm")


@dataclass
class Strike:
    kind: str
    moment: str
    ulfm: bool
    start: int
    """In which start of its run; 0 is the first."""
    ranks: int
    rank: int
    round: int = -1
    """The last one recorded at that moment."""
    struck: bool = False
    """False: the rank had ended."""
    handled: bool = False
    """Whether the process had a handler for the signal."""
    during_checkpoint: bool = False
    """Whether an unfinished checkpoint was there at that moment."""
    status: int | None = None
    ended_s: float | None = None
    """From the strike to the end of mpirun."""
    blamed: list[str] | None = None
    """The ranks that others called late."""
    lost_steps: int = 0
    """Local steps done again because of it."""
    recovery_s: float | None = None
    """From the strike until the run is beyond where it was: the first round recorded that was not recorded before."""
    at_s: float = 0.0
    """By the monotonic clock."""


@dataclass
class Plan:
    number: int
    kind: str
    moment: str
    ulfm: bool


class MetricsFile:
    """A run's metrics as they are written, with the time at which each line was seen."""

    def __init__(self, path):
        self.path = path
        self.lines: list[tuple[float, int]] = []
        self._size = 0

    def read(self):
        with suppress(FileNotFoundError):
            size = self.path.stat().st_size
            if size < self._size:  # a start before the first checkpoint put the file aside
                self._size = 0
            if size > self._size:
                data = self.path.read_bytes()
                *whole, _ = data[self._size :].split(b"\n")
                for line in whole:
                    self._size += len(line) + 1
                    with suppress(ValueError):
                        self.lines.append((time.monotonic(), json.loads(line)["round"]))

    def last_round(self):
        self.read()
        return max((number for _, number in self.lines), default=-1)


@dataclass
class Reference:
    """The undisturbed run."""

    prompts: bytes
    records: list
    start_up_s: float
    round_s: float
    end_s: float
    """From the last but one round's metrics to the end of mpirun."""
    two_rounds: int
    """Local steps in the two consecutive rounds that have the most: what a fault may cost with a checkpoint a round."""


class Trial:
    """One run: its starts, the strikes, and what was wrong."""

    def __init__(self, plan, arguments, world, reference):
        self.plan, self.reference, self.hosts = plan, reference, arguments.hosts
        self.rng = random.Random(f"{arguments.seed} {plan.number}")
        self.ranks = [arguments.ranks]
        self.folder = arguments.out / f"run_{plan.number:03d}"
        self.folder.mkdir()
        self.config = write_config(self.folder, world)
        self.files = RunFiles(tiny.run_dir(self.config))
        self.metrics = MetricsFile(self.files.metrics)
        self.strikes: list[Strike] = []
        self.statuses: list[int | None] = []
        self.wrong: list[str] = []
        self.began = time.monotonic()

    def run(self):
        """All starts, until one ends with status 0."""
        status = self.start(self.plan.kind, self.plan.moment, ulfm=self.plan.ulfm)
        again = not self.plan.ulfm and self.rng.random() < STRUCK_TWICE
        while status != 0 and len(self.ranks) <= MAX_RESTARTS:
            self.ranks.append(self.rng.choice([ranks for ranks in range(2, 6) if ranks != self.ranks[-1]]))
            if again:
                again = False
                status = self.start(self.rng.choice(KINDS), self.rng.choice(list(MOMENTS)))
            else:
                status = self.start()
                if status != 0:
                    self.wrong.append(f"start {len(self.ranks) - 1}, which nobody disturbed, ended with {status}")
        if status != 0:
            self.wrong.append(f"not done after {MAX_RESTARTS} further starts")
        else:
            self.compare()
        self.count_lost_steps()
        self.measure_recovery()

    def start(self, kind=None, moment=None, *, ulfm=False):
        """Start, strike if asked to, wait for the end; the exit status, None if it had to be ended."""
        number, ranks = len(self.ranks) - 1, self.ranks[-1]
        steps = self.folder / f"steps_{number}"
        steps.mkdir()
        settings = ["--set", "exchange.on_rank_failure=continue"] if ulfm else []
        if kind == "SIGSTOP":
            settings += ["--set", f"exchange.timeout_s={TIMEOUT_S}"]
        command = [ROOT / "tests/mpi/count_steps.py", steps, "run", self.config, *settings]
        output, options = self.folder / f"output_{number}.txt", WITH_ULFM if ulfm else ()
        with Job(ranks, *command, output=output, options=options, hosts=self.hosts) as job:
            strike = self.strike(job, kind, moment, ulfm) if kind else None
            status = job.wait(LIMIT_S if strike else START_LIMIT_S, self.metrics.read)
            ended = time.monotonic()
            if status is None:
                self.wrong.append(f"start {number} did not end by itself")
                self.ask_where(job)
            elif left := job.left():
                self.wrong.append(f"start {number} left {len(left)} processes behind")
        self.statuses.append(status)
        if strike:
            strike.status, strike.ended_s = status, ended - strike.at_s
            strike.blamed = sorted(set(re.findall(r"rank (\d+) on \S+ has not been heard of", job.text())))
            self.judge(strike)
        elif status == 0 and self.metrics.last_round() != ROUNDS - 1:
            self.wrong.append(f"start {number} ended with 0 after round {self.metrics.last_round() + 1}")
        return status

    def strike(self, job, kind, moment, ulfm):
        """At that moment send the signal to a random rank."""
        rank = self.rng.randrange(1 if ulfm else 0, job.num_ranks)
        strike = Strike(kind, moment, ulfm, start=len(self.ranks) - 1, ranks=job.num_ranks, rank=rank)
        pid = job.find(rank)
        if not self.wait_for(moment, job) and not job.ended:
            self.wrong.append(f"start {strike.start} hung before it was struck")
        job.look()
        strike.round = self.metrics.last_round()
        number = signal.Signals[kind]
        strike.handled = catches(pid, number)
        strike.during_checkpoint = bool(CheckpointFiles(self.files.run_dir).known)
        strike.at_s = time.monotonic()
        strike.struck = job.strike(pid, number)
        self.strikes.append(strike)
        return strike

    def wait_for(self, moment, job):
        """Whether the moment came before the job ended."""
        rng, reference = self.rng, self.reference
        first = self.metrics.last_round()
        if moment == "start-up":
            due = time.monotonic() + rng.uniform(0, reference.start_up_s)
            return job.until(lambda: time.monotonic() > due or self.metrics.last_round() > first, START_LIMIT_S)
        last = ROUNDS - 3
        target = last if moment == "end" else rng.randint(min(first + 1, last), last)
        came = job.until(lambda: self.metrics.last_round() >= target, START_LIMIT_S)
        if moment == "checkpoint":
            files, wanted = CheckpointFiles(self.files.run_dir), rng.randint(1, 6)

            def so_many_have_appeared():
                nonlocal wanted
                wanted -= files.count_new()
                return wanted <= 0

            job.until(so_many_have_appeared, 2.0)
            time.sleep(rng.uniform(0, 0.003))
        else:
            time.sleep(rng.uniform(0, reference.end_s if moment == "end" else reference.round_s))
        return came

    def judge(self, strike):
        """Whether the start ended as it must after this strike, with a whole checkpoint."""
        status, what = strike.status, f"after {strike.kind} at rank {strike.rank} ({strike.moment})"
        done = self.metrics.last_round() == ROUNDS - 1
        if status == 0 and not done:
            self.wrong.append(f"status 0 {what}, but round {self.metrics.last_round() + 1} is the last")
        elif status is not None and status != 0:
            if strike.ulfm or not strike.struck:
                allowed = False
            elif strike.kind in STOPS and strike.handled:
                allowed = status == EXIT_STOPPED
            else:
                allowed = status != EXIT_USER_ERROR and (status != EXIT_STOPPED or strike.kind in STOPS)
            if not allowed:
                self.wrong.append(f"status {status} {what}")
        between_steps = strike.moment in ("rounds", "checkpoint") and strike.struck and status not in (0, None)
        if strike.blamed != ([str(strike.rank)] if strike.kind == "SIGSTOP" else []) and between_steps:
            self.wrong.append(f"{what} the late ranks were said to be {strike.blamed}")
        checkpoints = Checkpoints(self.files.run_dir)
        try:
            for position in checkpoints.positions()[:1]:
                verify(checkpoints.path(position))
        except CheckpointError as error:
            self.wrong.append(f"{what}: {error}")

    def ask_where(self, job):
        """Into the output of a job that does not end: where its processes are."""
        with job.output.open("a") as file:
            for pid in job.look():
                with suppress(OSError):
                    state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
                    file.write(f"process {pid}: state {state}, in {Path(f'/proc/{pid}/wchan').read_text()}\n")
        for pid in job.look():
            if pid != job.launcher.pid:
                job.strike(pid, signal.SIGQUIT)
        job.wait(2.0)

    def compare(self):
        """The results with those of the undisturbed run."""
        if tiny.final_prompts(self.config) != self.reference.prompts:
            self.wrong.append("the final prompts are not those of the undisturbed run")
        if comparable(self.files.read_metrics()) != self.reference.records:
            self.wrong.append("the metrics are not those of the undisturbed run")

    def count_lost_steps(self):
        """A step that was begun again is lost to the strike at the start that began it last before."""
        last_begun = {}
        lost = dict.fromkeys(range(len(self.ranks)), 0)
        for start in lost:
            for step in steps_begun(self.folder / f"steps_{start}"):
                if step in last_begun:
                    lost[last_begun[step]] += 1
                last_begun[step] = start
        for strike in self.strikes:
            strike.lost_steps = lost.pop(strike.start)
            stopped = strike.status == EXIT_STOPPED
            if strike.lost_steps > (1 if stopped else self.reference.two_rounds):
                self.wrong.append(f"{strike.lost_steps} local steps were lost to {strike.kind}")
        if any(lost.values()):
            self.wrong.append(f"steps of undisturbed starts were done again: {lost}")

    def measure_recovery(self):
        for strike in self.strikes:
            if not strike.struck or (strike.status == 0 and not strike.ulfm):
                continue  # there was nothing to recover from
            until = strike.at_s + (0 if strike.ulfm else strike.ended_s)
            known = max((number for seen, number in self.metrics.lines if seen <= until), default=-1)
            new = [seen for seen, number in self.metrics.lines if seen > until and number > known]
            if new:
                strike.recovery_s = new[0] - strike.at_s

    def line(self):
        """What there is to say in one line."""
        strikes = "; ".join(
            f"{strike.kind} at rank {strike.rank} of {strike.ranks}, {strike.moment}"
            f"{' (ULFM)' if strike.ulfm else ''}, after round {strike.round + 1}"
            f" -> {strike.status} in {strike.ended_s:.1f} s{'' if strike.struck else ' (too late)'}, "
            f"{strike.lost_steps} steps lost, recovered in {seconds(strike.recovery_s)} s"
            for strike in self.strikes
        )
        ranks = ", ".join(f"{r}: {s}" for r, s in zip(self.ranks, self.statuses, strict=True))
        return f"{strikes} | ranks: status {ranks} | {'; '.join(self.wrong) or 'same bits'}"

    def details(self):
        """For the JSON file."""
        return {
            "run": self.plan.number,
            "ranks": self.ranks,
            "statuses": self.statuses,
            "wrong": self.wrong,
            "seconds": time.monotonic() - self.began,
            "strikes": [asdict(strike) for strike in self.strikes],
        }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--runs", type=int, default=64)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--ranks", type=int, default=4, help="of a run's first start; further ones take 2 to 5")
    parser.add_argument("--only", type=int, nargs="+", metavar="RUN", help="repeat some of the runs")
    parser.add_argument("--hosts", action="store_true", help="spread the ranks over two emulated hosts")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # still end what was started
    if arguments.hosts and (reason := why_not()):
        sys.exit(reason)
    arguments.out = arguments.out.absolute()
    arguments.out.mkdir(parents=True)
    if not arguments.hosts:
        return campaign(arguments)
    with tempfile.TemporaryDirectory() as folder, Hosts(folder, 2, [arguments.out]) as arguments.hosts:
        return campaign(arguments)


def campaign(arguments):
    """All runs; 1 if one of them went wrong."""
    world = tiny.write_world(arguments.out)
    reference = undisturbed(arguments, world)
    print(f"undisturbed: first round after {reference.start_up_s:.1f} s, {ROUNDS} of {reference.round_s:.3f} s")
    trials = []
    for plan in plans(arguments.runs, arguments.seed, with_ulfm=has_ulfm()):
        if arguments.only and plan.number not in arguments.only:
            continue
        trial = Trial(plan, arguments, world, reference)
        trial.run()
        trials.append(trial)
        print(f"{plan.number + 1}/{arguments.runs} {trial.line()}", flush=True)
        if not trial.wrong:
            shutil.rmtree(trial.folder)
        table = tabulate(trials)
        report = {"seed": arguments.seed, "table": table, "runs": [trial.details() for trial in trials]}
        (arguments.out / "chaos.json").write_text(json.dumps(report, indent=1))
    print_table(table)
    wrong = [trial for trial in trials if trial.wrong]
    for trial in wrong:
        print(f"WRONG, see {trial.folder}: {'; '.join(trial.wrong)}")
    print(f"{len(trials)} runs, {sum(len(trial.strikes) for trial in trials)} strikes, {len(wrong)} runs went wrong")
    return 1 if wrong else 0


def plans(count, seed, *, with_ulfm):
    """What is tried, in random order; every 64 runs hold every pair of kind and moment as often as planned."""
    pairs = [(kind, moment, False) for kind in KINDS for moment, times in MOMENTS.items() for _ in range(times)]
    pairs += [("SIGKILL", moment, with_ulfm) for moment, times in SURVIVED.items() for _ in range(times)]
    rng = random.Random(seed)
    drawn = []
    while len(drawn) < count:
        drawn += rng.sample(pairs, len(pairs))
    return [Plan(number, *pair) for number, pair in enumerate(drawn[:count])]


def write_config(folder, world):
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(world.read_text()), **SETTINGS, "run_dir": str(folder / "run")}))
    return path


def undisturbed(arguments, world):
    """A run without a strike: its results, and how long its parts take."""
    folder = arguments.out / "undisturbed"
    steps = folder / "steps"
    steps.mkdir(parents=True)
    config = write_config(folder, world)
    files = RunFiles(tiny.run_dir(config))
    metrics = MetricsFile(files.metrics)
    command = [ROOT / "tests/mpi/count_steps.py", steps, "run", config]
    with Job(arguments.ranks, *command, output=folder / "output.txt", hosts=arguments.hosts) as job:
        job.find(0)
        began = time.monotonic()
        if job.wait(START_LIMIT_S, metrics.read) != 0:
            sys.exit(f"the undisturbed run failed:\n{job.text()}")
        ended = time.monotonic()
    times = [seen for seen, _ in metrics.lines]
    per_round = [record["steps"] for record in files.read_metrics()]
    assert len(steps_begun(steps)) == len(set(steps_begun(steps))) == sum(per_round)
    return Reference(
        prompts=tiny.final_prompts(config),
        records=comparable(files.read_metrics()),
        start_up_s=times[0] - began,
        round_s=(times[-1] - times[0]) / (ROUNDS - 1),
        end_s=ended - times[-2],
        two_rounds=max(map(sum, pairwise(per_round))),
    )


def comparable(records):
    """What the metrics say of the result, without times and bytes."""
    return [[record[name] for name in SAME_RECORDS] for record in records]


def steps_begun(folder):
    """(round, device, step) of every local step that a start has begun, as often as it has."""
    return [line for path in sorted(folder.iterdir()) for line in path.read_text().splitlines()]


def seconds(value):
    return "-" if value is None else f"{value:.1f}"


def tabulate(trials):
    """A row for every kind of strike, and one for each of its moments."""
    groups = defaultdict(list)
    for trial in trials:
        for strike in trial.strikes:
            kind = f"{strike.kind} under ULFM" if strike.ulfm else strike.kind
            for group in ((kind, "all"), (kind, strike.moment), ("all", "all")):
                groups[group].append((strike, trial))
    order = {name: place for place, name in enumerate(("all", *MOMENTS))}
    rows = []
    for kind, moment in sorted(groups, key=lambda group: (group[0] == "all", group[0], order[group[1]])):
        strikes = [strike for strike, _ in groups[kind, moment]]
        trials_of = [trial for _, trial in groups[kind, moment]]
        statuses = [strike.status for strike in strikes]
        recoveries = [strike.recovery_s for strike in strikes if strike.recovery_s is not None]
        rows.append(
            {
                "signal": kind,
                "moment": moment,
                "strikes": len(strikes),
                "in checkpoint": sum(strike.during_checkpoint for strike in strikes),
                "too late": sum(not strike.struck for strike in strikes),
                "ended": sum(status is not None for status in statuses),
                "statuses": " ".join(f"{s}x{statuses.count(s)}" for s in dict.fromkeys(statuses)),
                "ended s max": seconds(max(strike.ended_s for strike in strikes)),
                "lost steps max": max(strike.lost_steps for strike in strikes),
                "recovery s median": seconds(statistics.median(recoveries) if recoveries else None),
                "recovery s max": seconds(max(recoveries, default=None)),
                "same bits": "no" if any("undisturbed run" in " ".join(t.wrong) for t in trials_of) else "yes",
                "left behind": sum("processes behind" in " ".join(t.wrong) for t in trials_of),
            }
        )
    return rows


def print_table(rows):
    columns = list(rows[0])
    widths = [max(len(column), *(len(str(row[column])) for row in rows)) for column in columns]
    for line in [dict(zip(columns, columns, strict=True)), *rows]:
        print("  ".join(str(line[column]).ljust(width) for column, width in zip(columns, widths, strict=True)).rstrip())


if __name__ == "__main__":
    sys.exit(main())
