"""Runs that differ in their seed alone are one group; its numbers are means and deviations over them."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from fedhpc.commands.report.runs import PHASES, Floats, Run
from fedhpc.config import WITHOUT_EFFECT
from fedhpc.evaluate.scores import GLOBAL, Score

FREE = ("seed", "data.task", "data.max_length", *(key for key in WITHOUT_EFFECT if key != "data."))
"""Beginnings of keys in which the runs of a group may differ, but for those of DECODING."""
DECODING = ("evaluate.max_new_tokens", "evaluate.temperature", "evaluate.top_p")
"""Keys on which written answers depend, and with them their scores."""
AXES = ("tuning.kind", "server.method")
"""Keys that name a configuration before all others."""
MARGIN = 0.05
"""The target, unless one is given, is so much of the best final value behind it."""


class Stat(NamedTuple):
    """Mean and sample standard deviation of so many runs; the deviation of one run is NaN."""

    mean: float
    deviation: float
    runs: int


class Goal(NamedTuple):
    """What the runs of a task are held to."""

    target: float | None
    """Value of the leading score to be reached."""
    budget: float | None
    """Bytes: as many as the most thrifty run moved; None where all moved as many."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Runs of one configuration."""

    label: str
    settings: Mapping[str, Any]
    """Dotted key -> value, where groups of a task differ."""
    runs: Sequence[Run]
    """Ordered by seed."""

    @property
    def counted(self) -> list[Run]:
        """The runs behind the group's numbers, one a seed: those that are finished, or all while none is."""
        among = [run for run in self.runs if run.is_finished] or list(self.runs)
        return list({run.seed: run for run in sorted(among, key=lambda run: run.rounds_done)}.values())

    @property
    def is_finished(self) -> bool:
        """Whether the numbers are of finished runs."""
        return any(run.is_finished for run in self.runs)

    @property
    def state(self) -> str:
        """How many runs there are, and how many are finished if not all."""
        finished, total = sum(run.is_finished for run in self.runs), len(self.runs)
        seeds = len({run.seed for run in self.runs})
        again = f", of {seeds} seed(s)" if seeds < total else ""
        return (str(total) if finished == total else f"{finished} of {total} finished") + again


def group_runs(runs: Iterable[Run]) -> dict[str, list[Group]]:
    """Task -> groups, in the order in which they were first met; tasks of one name and several metrics are several."""
    runs = list(runs)
    known = {run.config.get("data.path"): run.task for run in runs if run.config.get("data.task")}
    names = {
        id(run): run.task if run.config.get("data.task") else known.get(run.config.get("data.path"), run.task)
        for run in runs
    }
    own = Counter(task for task, _ in {(names[id(run)], run.scores[0].name) for run in runs if run.is_evaluated})
    found: dict[str, dict[str, list[Run]]] = {}
    for run in runs:
        same = {key: value for key, value in run.config.items() if _counts(key)}
        name = names[id(run)]
        task = name if own[name] < 2 else f"{name} ({run.scores[0].name})"
        found.setdefault(task, {}).setdefault(repr(sorted(same.items())), []).append(run)
    tasks = {task: list(parts.values()) for task, parts in found.items()}
    differing = _differing([[members[0].config for members in parts] for parts in tasks.values()])
    label = _labels(tasks, differing)
    return {
        task: [
            Group(
                label=label(members[0].config),
                settings={key: members[0].config.get(key) for key in differing},
                runs=sorted(members, key=lambda run: run.seed or 0),
            )
            for members in parts
        ]
        for task, parts in tasks.items()
    }


def _counts(key: str) -> bool:
    """Whether runs that differ in a key are two configurations."""
    return key in DECODING or not key.startswith(FREE)


def _differing(tasks: Sequence[Sequence[Mapping[str, Any]]]) -> list[str]:
    """Keys in which two configurations of a task differ, in the order of the configuration."""
    keys = dict.fromkeys(key for configs in tasks for config in configs for key in config if _counts(key))
    return [key for key in keys if any(len({repr(config.get(key)) for config in configs}) > 1 for configs in tasks)]


def _labels(tasks: Mapping[str, Sequence[Sequence[Run]]], differing: list[str]) -> Callable[[Mapping[str, Any]], str]:
    """Names for configurations: by as few keys as tell the groups of every task apart.

    What follows from another choice goes: numbers first, then what only some groups have, then the later keys.
    """
    tables = [[members[0].config for members in parts] for parts in tasks.values()]

    def are_distinct(keys: Sequence[str]) -> bool:
        return all(len({_label(config, keys) for config in configs}) == len(configs) for configs in tables)

    values = {key: [config.get(key) for configs in tables for config in configs] for key in differing}
    numbers = [key for key in differing if not any(isinstance(value, str) for value in values[key])]
    partial = [key for key in differing if key not in numbers and None in values[key]]
    others = [key for key in differing if key not in (*numbers, *partial, *AXES)]
    keys = list(differing)
    for key in [*reversed(numbers), *reversed(partial), *reversed(others)]:
        without = [kept for kept in keys if kept != key]
        if without and are_distinct(without):
            keys = without
    return lambda config: _label(config, keys) or _label(config, AXES) or "all runs"


def _label(config: Mapping[str, Any], keys: Sequence[str]) -> str:
    named = {key: config[key] for key in keys if config.get(key) is not None}
    return ", ".join(f"{leaf_name(key, keys)}={value}" for key, value in named.items())


def leaf_name(key: str, among: Sequence[str]) -> str:
    """The last part of a dotted key, or all of it where another key ends the same."""
    leaf = key.rpartition(".")[2]
    return key if sum(other.rpartition(".")[2] == leaf for other in among) > 1 else leaf


def stat(values: Iterable[float]) -> Stat | None:
    """Mean and deviation of the finite values; None if there are none."""
    known = np.array([value for value in values if math.isfinite(value)])
    if not known.size:
        return None
    deviation = float(known.std(ddof=1)) if len(known) > 1 else math.nan
    return Stat(float(known.mean()), deviation, len(known))


def task_scores(groups: Sequence[Group]) -> list[Score]:
    """The task's scores, the one that leads first."""
    return max((run.scores for group in groups for run in group.runs), key=len)


def goal_of(groups: Sequence[Group], target: float | None) -> Goal:
    """What a task's runs are held to; 5 % behind the best final value of the leading score, if that is above 0, unless
    a target is given.

    Finished runs alone decide, or all while none is finished.
    """
    every = [run for group in groups for run in group.runs]
    runs = [run for run in every if run.is_finished] or every
    lead = task_scores(groups)[0]
    best = lead.best_of(final(run, lead.name) for run in runs)
    if target is None and best > 0:
        target = (1 - lead.sign * MARGIN) * best
    moved = {float(run.bytes[-1]) for run in runs if run.bytes.any()}
    return Goal(target, min(moved) if len(moved) > 1 else None)


def final(run: Run, key: str, within: float = math.inf) -> float:
    """The latest value of a metric, before so many bytes were exceeded; NaN if there is none."""
    values = run.column(key)
    known = values[np.isfinite(values) & (run.bytes <= within)]
    return float(known[-1]) if known.size else math.nan


def facts(run: Run, goal: Goal) -> dict[str, float]:
    """All single numbers of a run that the tables show; NaN where one is not known."""
    lead = run.scores[0]
    numbers = {key: final(run, key) for key in run.score_keys}
    numbers |= {f"best_{key}": score.best_of(run.column(key)) for key, score in run.score_keys.items()}
    evaluated = run.column(lead.name + GLOBAL)
    numbers["last_five_deviation"] = deviation_of_last(evaluated)
    is_known = bool(np.isfinite(evaluated).any())
    numbers["best_round"] = run.rounds[np.nanargmax(lead.sign * evaluated)] if is_known else math.nan
    numbers["at_equal_bytes"] = math.nan if goal.budget is None else final(run, lead.name, within=goal.budget)
    numbers |= {key: final(run, key) for key in ("loss", "epsilon")}
    target = math.nan if goal.target is None else goal.target
    reached = np.flatnonzero(lead.sign * run.column(lead.name) >= lead.sign * target)
    for name in ("rounds", "steps", "bytes", "seconds", "seconds_slowest_device", "seconds_simulated"):
        values: Floats = getattr(run, name)
        is_known = bool(values.any())  # a single process moves no bytes
        numbers[name] = float(values[-1]) if is_known else math.nan
        numbers[f"{name}_to_target"] = float(values[reached[0]]) if is_known and reached.size else math.nan
    skipped = [_is_skipped(record) for record in run.records]
    numbers["skipped_rounds"] = float(sum(skipped)) if any(skipped) else math.nan
    numbers |= _spread(run)
    for phase in PHASES:
        numbers[f"seconds_{phase}"] = float(np.nanmean(run.phase(phase))) if run.records else math.nan
    return numbers


def _is_skipped(record: Mapping[str, Any]) -> bool:
    """Whether a round left everything as it was."""
    if "taken" in record:
        return not record["taken"]
    return len(record.get("absent") or ()) == len(record.get("devices") or (0,))


def deviation_of_last(values: Floats, count: int = 5) -> float:
    """How far a metric's latest values, those that are known, lie apart; NaN where there are fewer."""
    known = values[np.isfinite(values)][-count:]
    return float(known.std(ddof=1)) if known.size == count else math.nan


def _spread(run: Run) -> dict[str, float]:
    """How unequal the devices are: deviation over all of them, mean of the worst and of the best tenth."""
    accuracy = np.sort(run.device_accuracy)
    if not accuracy.size:
        return dict.fromkeys(("device_mean", "device_deviation", "device_worst", "device_best"), math.nan)
    tenth = math.ceil(len(accuracy) / 10)
    return {
        "device_mean": float(accuracy.mean()),
        "device_deviation": float(accuracy.std()),
        "device_worst": float(accuracy[:tenth].mean()),
        "device_best": float(accuracy[-tenth:].mean()),
    }
