"""What a page says about one task: its charts, tables and bars."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from fedhpc.commands.report import charts, tables
from fedhpc.commands.report.answers import Answers, find_answers
from fedhpc.commands.report.charts import ChartAxis, Series
from fedhpc.commands.report.groups import Goal, Group, goal_of, task_scores
from fedhpc.commands.report.mix import class_mix, partition_setting
from fedhpc.commands.report.paired import paired_table
from fedhpc.commands.report.runs import PHASES, Floats, Run
from fedhpc.commands.report.tables import Column, Summary, Table
from fedhpc.commands.report.units import Quantity, unit_for
from fedhpc.errors import UserError
from fedhpc.evaluate.scores import GLOBAL, HELD_OUT, Score

PHASE_NAMES = {"local": "local work", "idle": "waiting for others"}
AXES: dict[str, tuple[str, Quantity]] = {
    "rounds": ("rounds", "rounds"),
    "bytes": ("bytes moved ({})", "bytes"),
    "seconds": ("time ({})", "seconds"),
    "seconds_simulated": ("simulated time ({})", "seconds"),
}
"""What a chart goes along -> its title, and what it is counted in."""


@dataclass(frozen=True, kw_only=True)
class NamedBar:
    """A named bar."""

    name: str
    bar: Markup
    words: str = ""
    index: int | None = None
    """Number of its group, if it is hidden with that."""


@dataclass(frozen=True, kw_only=True)
class Bars:
    """Bars among each other, with what their colours and ends mean."""

    title: str
    rows: Sequence[NamedBar]
    colours: Sequence[str] = ()
    ends: Sequence[str] = ()
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class TaskPart:
    """All about one task."""

    name: str
    groups: Sequence[Group]
    summaries: Sequence[Summary]
    goal: Goal
    charts: Sequence[tuple[str, Markup]]
    tables: Sequence[Table]
    bars: Sequence[Bars]
    answers: Answers | None
    notes: Sequence[str]


def task_part(name: str, groups: Sequence[Group], given: float | None) -> TaskPart:
    """Everything about a task's groups, with the target given, or one of its own."""
    goal = goal_of(groups, given)
    summaries = [tables.summarise(group, goal) for group in groups]
    notes: list[str] = []
    return TaskPart(
        name=name,
        groups=groups,
        summaries=summaries,
        goal=goal,
        charts=list(_charts(name, groups)),
        tables=list(_tables(groups, summaries, goal)),
        bars=[*_bars(groups, summaries), *_mixes(groups, notes)],
        answers=find_answers(groups),
        notes=notes,
    )


def _charts(task: str, groups: Sequence[Group]) -> Iterator[tuple[str, Markup]]:
    """Title and drawing of every chart for which there is anything to draw."""
    lead, *others = task_scores(groups)
    views = [
        (f"{lead.title} by round", lead.name, "rounds"),
        (f"{lead.title} by bytes moved", lead.name, "bytes"),
        (f"{lead.title} by time", lead.name, "seconds"),
        (f"{lead.title} by simulated time", lead.name, "seconds_simulated"),
        *([(f"global {lead.title} by round", lead.name + GLOBAL, "rounds")] if _is_personal(groups, lead.name) else []),
        (f"{lead.title} of held-out devices by round", lead.name + HELD_OUT, "rounds"),
        *((f"{score.title} by round", score.name, "rounds") for score in others),
        ("training loss by round", "loss", "rounds"),
    ]
    for title, key, along in views:
        lines = [line for index, group in enumerate(groups) if (line := _series(index, group, key, along))]
        if lines:
            axis = _axis(along, max(float(line.x.max()) for line in lines))
            yield title, charts.line_chart(f"{task}: {title}", lines, axis)


def _is_personal(groups: Sequence[Group], metric: str) -> bool:
    """Whether any run has a personalised metric that is not the global one."""
    runs = [run for group in groups for run in group.runs]
    return any(not np.array_equal(run.column(metric), run.column(metric + GLOBAL), equal_nan=True) for run in runs)


def _series(index: int, group: Group, key: str, along: str) -> Series | None:
    """Means over the group's runs of what was recorded after the same rounds; the band is lowest to highest.

    Only rounds that all runs have, where there are such: others would let the line jump from one seed to another.
    """
    points: dict[float, list[tuple[float, float]]] = {}
    for run in group.counted:
        x: Floats = getattr(run, along)
        if along != "rounds" and not x.any():  # a single process moves nothing
            continue
        for done, at, value in zip(run.rounds, x, run.column(key), strict=True):
            if np.isfinite(value):
                points.setdefault(float(done), []).append((float(at), float(value)))
    if not points:
        return None
    most = max(map(len, points.values()))
    columns = [np.array(points[done]) for done in sorted(points) if len(points[done]) == most]
    means = np.array([column.mean(axis=0) for column in columns])
    return Series(
        index=index,
        name=group.label,
        x=means[:, 0],
        y=means[:, 1],
        low=np.array([column[:, 1].min() for column in columns]),
        high=np.array([column[:, 1].max() for column in columns]),
    )


def _axis(along: str, largest: float) -> ChartAxis:
    title, quantity = AXES[along]
    unit = unit_for(quantity, [largest])
    return ChartAxis(title=title.format(unit.name), unit=unit.size)


def _tables(groups: Sequence[Group], summaries: Sequence[Summary], goal: Goal) -> Iterator[Table]:
    scores = task_scores(groups)
    lead = scores[0]
    columns = [*tables.score_columns(scores, goal.budget), tables.LOSS, tables.EPSILON]
    notes = ["mean ± standard deviation over seeds; best in bold", *tables.less_is_better(scores)]
    yield tables.group_table("final results", groups, summaries, columns, with_runs=True, notes=notes)
    notes = ["of all evaluations, each number by itself, as papers report it", *tables.less_is_better([lead])]
    yield tables.group_table("best round", groups, summaries, tables.best_columns(lead), notes=notes)
    if paired := paired_table(groups, lead):
        yield paired
    yield tables.group_table("cost of the whole run", groups, summaries, tables.COST)
    if goal.target is not None:
        title = f"cost to reach {lead.title} {goal.target:.3f}"
        yield tables.group_table(
            title,
            groups,
            summaries,
            tables.TO_TARGET,
            notes=["at the first evaluation that reached it; means over the runs that did"],
        )
    if any(summary.get("device_mean") for summary in summaries):
        notes = ["every device alike, whatever it holds; deviation over all devices; means of the worst and best tenth"]
        yield tables.group_table(f"{_accuracy(groups).title} by device", groups, summaries, tables.SPREAD, notes=notes)
    phases = [_phase_column(phase) for phase in PHASES]
    yield tables.group_table("time of a round by phase", groups, summaries, phases)


def _accuracy(groups: Sequence[Group]) -> Score:
    return next(score for score in task_scores(groups) if score.name == "accuracy")


def _phase_column(phase: str) -> Column:
    return Column(heading=PHASE_NAMES.get(phase, phase), key=f"seconds_{phase}", quantity="seconds")


def _bars(groups: Sequence[Group], summaries: Sequence[Summary]) -> Iterator[Bars]:
    words = _accuracy(groups).title
    spread = [
        NamedBar(
            name=group.label,
            bar=charts.box_bar(f"{words} of the devices, {group.label}", values, index),
            words=f"median {np.median(values):.3f}",
            index=index,
        )
        for index, group in enumerate(groups)
        if (values := np.concatenate([run.device_accuracy for run in group.counted])).size
    ]
    if spread:
        note = "Thin: 5 % to 95 % of the devices; thick: the middle half; line: the median. All seeds together."
        ends = ("0", "0.25", "0.5", "0.75", "1")
        yield Bars(title=f"{words.capitalize()} by device", rows=spread, ends=ends, note=note)
    if phases := list(_phase_rows(groups, summaries)):
        names = [PHASE_NAMES.get(phase, phase) for phase in PHASES]
        yield Bars(title="Time of a round by phase", rows=phases, colours=names)
    if layers := list(_layer_rows(groups)):
        note = (
            "Stronger: higher score; underlined: exchanged with the server. From the lowest seed's newest checkpoint."
        )
        yield Bars(title="Layers and their scores", rows=layers, ends=("first layer", "last layer"), note=note)


def _phase_rows(groups: Sequence[Group], summaries: Sequence[Summary]) -> Iterator[NamedBar]:
    times = [
        [found.mean if (found := summary.get(f"seconds_{phase}")) else 0.0 for phase in PHASES] for summary in summaries
    ]
    longest = max(map(sum, times), default=0.0)
    for index, (group, seconds) in enumerate(zip(groups, times, strict=True)):
        if sum(seconds) > 0:
            names = (f"{PHASE_NAMES.get(p, p)}: {_seconds(s)}" for p, s in zip(PHASES, seconds, strict=True))
            parts = list(zip(names, seconds, strict=True))
            bar = charts.stacked_bar(f"time of a round by phase, {group.label}", parts, longest)
            yield NamedBar(name=group.label, bar=bar, words=_seconds(sum(seconds)), index=index)


def _seconds(value: float) -> str:
    return unit_for("seconds", [value]).full_text(value)


def _layer_rows(groups: Sequence[Group]) -> Iterator[NamedBar]:
    for index, group in enumerate(groups):
        layers = next((run.layers for run in group.counted if run.layers), None)
        if layers and layers.count:
            bar = charts.layer_bar(f"layer scores, {group.label}", layers)
            words = f"exchanged: {', '.join(map(str, layers.exchanged))}"
            yield NamedBar(name=group.label, bar=bar, words=words, index=index)


def _mixes(groups: Sequence[Group], notes: list[str]) -> Iterator[Bars]:
    """Each way in which the runs divide the data, for the lowest seed; what cannot be read is noted."""
    first: dict[tuple[str, str], Run] = {}
    for run in sorted((run for group in groups for run in group.runs), key=lambda run: run.seed or 0):
        first.setdefault((str(run.config.get("data.path")), partition_setting(run)), run)
    rows: dict[tuple[str, ...], list[NamedBar]] = {}
    for run in first.values():
        try:
            mix = class_mix(run)
        except (UserError, OSError) as error:
            notes.append(f"Class mix of {partition_setting(run)} left out: {error}")
            continue
        sizes = mix.counts.sum(axis=1)
        words = f"label skew {mix.skew:.2f}; {sizes.min()} to {sizes.max()} examples"
        bar = charts.class_bars(f"classes of the devices, {mix.setting}: {words}", mix)
        rows.setdefault(tuple(mix.class_names), []).append(NamedBar(name=mix.setting, bar=bar, words=words))
    for names, found in rows.items():
        note = "A bar for each device, from the largest to the smallest. Skew: 0 all alike, 1 nothing in common."
        yield Bars(title="Class mix of the devices", rows=found, colours=names, note=note)
