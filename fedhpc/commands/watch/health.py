"""How a run is doing, from the files in its folder alone."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedhpc.checkpoint.files import SEAL, CheckpointFiles
from fedhpc.commands.report.runs import read_config
from fedhpc.commands.watch.files import Files
from fedhpc.commands.watch.history import History, Start, read_history
from fedhpc.errors import CheckpointError
from fedhpc.evaluate.scores import score_keys
from fedhpc.files import names_in
from fedhpc.job.environment import machine_id
from fedhpc.job.lock import WATCH_S, Owner
from fedhpc.job.run_files import LARGEST_NUMBER, RunFiles, records_in, rounds_of
from fedhpc.job.status import STATUS_FILE, RankStatus, Status

RECENT = 10
"""Rounds that the time of a round is a mean of."""
SILENT_S = 16.0
"""Three heartbeats: a rank that was not heard of for so long is within one long step, or worse."""
WAITED_S = 10.0
"""A rank is late once half of the device ranks have waited so long for it."""
MADE_BY_A_RUN = {"config.yaml", "metrics.jsonl", "log.txt", "checkpoints", STATUS_FILE}
NO_CONFIG: tuple[dict[str, Any], str] = ({}, "")
NO_RECORDS: tuple[list[dict[str, Any]], int] = ([], 0)
WAITING = "waiting"
"""What a rank does that has nothing to do begins so."""


@dataclass(frozen=True, kw_only=True)
class Rank(RankStatus):
    """A rank, judged."""

    late: bool
    """Others wait for it."""
    silent: bool


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Whose lock is in the folder."""

    title: str
    host: str
    process: int
    alive: bool | None
    """By this machine's process table; None if it is another machine's."""


@dataclass(frozen=True, kw_only=True)
class Newest:
    """The newest checkpoint, which `fedhpc inspect` verifies."""

    name: str
    age_s: float


@dataclass(frozen=True, kw_only=True)
class Health:
    """A run, as its files tell it. Seconds are up to the moment of the look."""

    run_dir: str
    state: str
    """`running`; `silent`: no sign of life; `stopped` on request; `failed`; `lost`: ended without a word; `done`; or
    `not begun`."""
    why: str
    """Of a stop or a failure, also of a stop that is only requested."""
    silent_s: float | None
    """Since the last sign of life, while somebody has the folder."""
    rounds_done: int
    rounds: int | None
    """All that the run has."""
    newest: Mapping[str, Any]
    """Of the last round: its number, counted from 1, and loss; absent devices by reason; its rejected uploads."""
    scores: Mapping[str, float]
    """Of the last evaluation, by their names in metrics.jsonl."""
    evaluated_after: int | None
    """The round of it, counted from 1."""
    bytes: int
    bytes_a_round: float | None
    seconds_a_round: float | None
    """Of the last rounds."""
    seconds_to_go: float | None
    stops_in_s: float | None
    """Until the run stops itself, before the job's time limit."""
    epsilon: float | None
    """Under `privacy`, what the rounds so far cost."""
    checkpoint: Newest | None
    holder: Holder | None
    status_age_s: float | None
    """Since the ranks' state was written."""
    ranks: Sequence[Rank]
    history: History
    left_out: Sequence[str]
    """Files, or parts of them, that could not be read."""

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come of it by itself."""
        return self.state in ("done", "failed")

    @property
    def stops_first(self) -> bool:
        """Whether it stops itself before it is done."""
        return None not in (self.stops_in_s, self.seconds_to_go) and self.stops_in_s < self.seconds_to_go  # type: ignore[operator]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"stops_first": self.stops_first}


def is_run_dir(path: Path) -> bool:
    """Whether a run has written in this folder; while it sets up, there may be no more than a lock.

    Raises:
        OSError: it cannot be listed.
    """
    return not MADE_BY_A_RUN.isdisjoint(names_in(path))


def look(path: Path, files: Files) -> Health:
    """How the run in a folder is doing now."""
    run, status_path, lock_path, left_out = RunFiles(path), path / STATUS_FILE, path / "lock", []
    records, passed_over = files.read(run.metrics, records_in, NO_RECORDS)
    if passed_over:
        left_out.append(f"{run.metrics.name}: {passed_over} line(s), cut short or damaged")
    history = files.read(run.log, read_history, History())
    last = history.starts[-1] if history.starts else None
    rounds, problem = _rounds(run, files, records, last)
    left_out += [problem] if problem else []
    done = int(records[-1]["round"]) + 1 if records else 0
    status = files.read(status_path, Status.parse, None)
    status_age, lock_age = files.age(status_path), files.age(lock_path)
    if status is None and status_age is not None and status_path not in files.problems:
        left_out.append(f"{STATUS_FILE}: cut short or damaged")
    holder = _holder(files.read(lock_path, Owner.parse, None))
    if status and not (holder and holder.process == status.process):  # it is of an earlier start
        status = None
    left_out += [f"{file.name}: {why}" for file, why in files.problems.items() if file.parent == path]
    silent = min((age for age in (status_age, lock_age) if age is not None), default=None)
    state = _state(path, holder, silent, last, is_done=rounds is not None and done >= rounds)
    is_held = state in ("running", "silent")
    moved, pace, age = sum(record["bytes"] for record in records), _pace(records), status_age or 0.0
    began = [files.age(run.metrics) or 0.0, *([status.up_s + age] if status else [])]
    return Health(
        run_dir=str(path),
        state=state,
        why=(status.stop if status else "") if is_held else last.why if last else "",
        silent_s=silent if is_held else None,
        rounds_done=done,
        rounds=rounds,
        newest=_newest(records),
        **_evaluated(records),
        bytes=moved,
        bytes_a_round=moved / len(records) if records else None,
        seconds_a_round=pace,
        seconds_to_go=_to_go(pace, rounds, done, min(began) if state == "running" else 0.0),
        stops_in_s=max(0.0, status.stops_in_s - age) if is_held and status and status.stops_in_s is not None else None,
        epsilon=_finite(records[-1].get("epsilon")) if records else None,
        checkpoint=_checkpoint(path, files),
        holder=holder,
        status_age_s=status_age,
        ranks=_judged(status.ranks) if status else [],
        history=history,
        left_out=left_out,
    )


def _rounds(
    run: RunFiles, files: Files, records: Sequence[Mapping[str, Any]], last: Start | None
) -> tuple[int | None, str]:
    """How many rounds the run has, by its configuration, or else by its log; what is wrong with the former."""
    config, problem = files.read(run.config, lambda _: _config(run.config), NO_CONFIG)
    rounds = config.get("federation.rounds", last.rounds if last else None)
    if rounds is None or (isinstance(rounds, int) and rounds < LARGEST_NUMBER):
        return rounds and rounds_of(records, rounds, config.get("privacy.epsilon")), problem
    return None, f"{run.config.name}: federation.rounds: {rounds!r} is no number of rounds"


def _config(path: Path) -> tuple[dict[str, Any], str]:
    """A run's configuration by dotted key, or why it cannot be read."""
    try:
        return read_config(path), ""
    except CheckpointError as error:
        return {}, " ".join(str(error).split())


def _holder(owner: Owner | None) -> Holder | None:
    if owner is None:
        return None
    return Holder(title=owner.title, host=owner.host, process=owner.pid, alive=owner.lives_here(machine_id()))


def _state(path: Path, holder: Holder | None, silent_s: float | None, last: Start | None, *, is_done: bool) -> str:
    is_locked = os.path.lexists(path / "lock")
    if is_locked and not (holder and holder.alive is False):
        return "running" if silent_s is None or silent_s < WATCH_S else "silent"
    if is_done or (last and last.end == "done"):
        return "done"
    if last and last.end:
        return last.end
    return "lost" if is_locked or last else "not begun"


def _newest(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    if not records:
        return {}
    last = records[-1]
    absent = Counter(str(entry.get("reason")).partition(" (")[0] for entry in last.get("absent", ()))
    rejected = last.get("rejected")
    return {
        "round": int(last["round"]) + 1,
        "loss": _finite(last.get("loss")),
        "absent": dict(absent),
        "rejected": len(rejected) if isinstance(rejected, list) else 0,
    }


def _evaluated(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    evaluated = [record for record in records if record.get("accuracy_global") is not None]
    if not evaluated:
        return {"scores": {}, "evaluated_after": None}
    last = evaluated[-1]
    scores = {key: value for key in score_keys(evaluated) if (value := _finite(last.get(key))) is not None}
    return {"scores": scores, "evaluated_after": int(last["round"]) + 1}


def _finite(value: Any) -> float | None:
    return value if isinstance(value, int | float) and abs(value) <= LARGEST_NUMBER else None


def _pace(records: Sequence[Mapping[str, Any]]) -> float | None:
    """Mean seconds of the last rounds; None before the first."""
    took = [_finite(record.get("seconds", {}).get("round")) for record in records[-RECENT:]]
    known = [seconds for seconds in took if seconds is not None]
    return sum(known) / len(known) if known else None


def _to_go(pace: float | None, rounds: int | None, done: int, since: float) -> float | None:
    """Seconds until the last round is done, `since` seconds after the present one began."""
    if pace is None or rounds is None:
        return None
    return max(0, rounds - done) * pace - min(since, pace) if done < rounds else 0.0


def _checkpoint(path: Path, files: Files) -> Newest | None:
    checkpoints = CheckpointFiles(path)
    for position in checkpoints.positions():
        if (age := files.age(checkpoints.path(position) / SEAL)) is not None:
            return Newest(name=str(position), age_s=age)
    return None


def _judged(ranks: Sequence[RankStatus]) -> list[Rank]:
    """The ranks; those are late that are at work while half of the device ranks have waited for a while."""
    devices = [rank for rank in ranks if rank.rank > 0]
    waiting = [rank for rank in devices if rank.doing.startswith(WAITING) and rank.for_s >= WAITED_S]
    others_wait = len(waiting) > 0 and 2 * len(waiting) >= len(devices)
    return [
        Rank(
            **asdict(rank),
            late=others_wait and rank.rank > 0 and not rank.doing.startswith(WAITING),
            silent=rank.silent_s >= SILENT_S,
        )
        for rank in ranks
    ]
