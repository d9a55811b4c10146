"""Tables of groups: columns of means and deviations, the best in bold."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from fedhpc.commands.report.groups import Goal, Group, Stat, facts, stat
from fedhpc.commands.report.units import Quantity, Unit, unit_for
from fedhpc.evaluate.scores import PERPLEXITY, VIEWS, Score

UNKNOWN = "–"
UNFINISHED = "\u00a0†"
"""Marks what comes of no finished run."""
NO_RUN_IS_FINISHED = "† no run is finished: the latest values, not compared with the others"


@dataclass(frozen=True, kw_only=True)
class TableCell:
    """What stands in a row's column."""

    text: str
    is_best: bool = False


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table as text; the first column names the row."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[TableCell]]
    notes: Sequence[str] = ()
    is_text: bool = False
    """Whether the cells hold words rather than numbers."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """One number of the groups."""

    heading: str
    key: str
    quantity: Quantity
    best: Literal["highest", "lowest"] | None = None


Summary = Mapping[str, Stat | None]


def summarise(group: Group, goal: Goal) -> Summary:
    """Every number of a group."""
    numbers = [facts(run, goal) for run in group.counted]
    keys = dict.fromkeys(key for run in numbers for key in run)
    return {key: stat(run.get(key, math.nan) for run in numbers) for key in keys}


def group_table(
    title: str,
    groups: Sequence[Group],
    summaries: Sequence[Summary],
    columns: Sequence[Column],
    *,
    with_runs: bool = False,
    notes: Sequence[str] = (),
) -> Table:
    """One row for each group; only those with as many finished runs as any, all of them known, can be the best."""
    columns = [column for column in columns if any(summary.get(column.key) for summary in summaries)]
    drawn = [_column(groups, [summary.get(column.key) for summary in summaries], column) for column in columns]
    names = [[name_cell(group), *([TableCell(text=group.state)] if with_runs else [])] for group in groups]
    rows = [[*name, *(cells[index] for _, cells in drawn)] for index, name in enumerate(names)]
    headings = ["configuration", *(["runs"] if with_runs else []), *(heading for heading, _ in drawn)]
    if any(not group.is_finished for group in groups):
        notes = [*notes, NO_RUN_IS_FINISHED]
    return Table(title=title, headings=headings, rows=rows, notes=[*notes, *_fewer(groups)])


def name_cell(group: Group) -> TableCell:
    """The group's label; a dagger on those without a finished run."""
    return TableCell(text=group.label + ("" if group.is_finished else UNFINISHED))


def _are_rivals(groups: Sequence[Group], stats: Sequence[Stat | None]) -> list[bool]:
    """Whether each may be the best: of as many finished runs as any, and known for all of them."""
    most = max((len(group.counted) for group in groups if group.is_finished), default=0)
    return [
        found is not None and group.is_finished and found.runs == most
        for group, found in zip(groups, stats, strict=True)
    ]


def _fewer(groups: Sequence[Group]) -> list[str]:
    """A note if some groups have fewer runs than others."""
    numbers = {len(group.counted) for group in groups if group.is_finished}
    return [f"only configurations with {max(numbers)} finished runs are compared"] if len(numbers) > 1 else []


def _column(groups: Sequence[Group], stats: Sequence[Stat | None], column: Column) -> tuple[str, list[TableCell]]:
    """Heading with unit, and the cells; the best are all that look like the best."""
    unit = unit_for(column.quantity, (found.mean for found in stats if found))
    are_rivals = _are_rivals(groups, stats)
    rivals = [found.mean for found, is_rival in zip(stats, are_rivals, strict=True) if found and is_rival]
    choose = {"highest": max, "lowest": min}.get(column.best or "")
    best = unit.text(choose(rivals)) if choose and len(rivals) > 1 else None
    cells = [
        TableCell(
            text=stat_text(found, unit, len(group.counted)),
            is_best=found is not None and is_rival and unit.text(found.mean) == best,
        )
        for group, found, is_rival in zip(groups, stats, are_rivals, strict=True)
    ]
    return f"{column.heading} ({unit.name})" if unit.name else column.heading, cells


def overview(tasks: Sequence[tuple[str, Score, Sequence[Group], Sequence[Summary]]]) -> Table:
    """The tasks' leading scores, configurations by tasks, and their mean over all tasks where it is known for each.

    Only configurations with as many finished runs as any of the task count for the mean; there is none of scores of
    which some are the better the less they are.
    """
    columns: list[dict[str, TableCell]] = []
    means: dict[str, list[float]] = {}
    labels: dict[str, TableCell] = {}
    for _, score, groups, summaries in tasks:
        stats = [summary.get(score.name) for summary in summaries]
        columns.append({})
        cells, are_rivals = _column(groups, stats, _views(score)[0])[1], _are_rivals(groups, stats)
        for group, found, cell, is_rival in zip(groups, stats, cells, are_rivals, strict=True):
            text = cell.text if group.is_finished else cell.text + UNFINISHED
            columns[-1][group.label] = TableCell(text=text, is_best=cell.is_best)
            labels[group.label] = TableCell(text=group.label)
            means.setdefault(group.label, []).extend([found.mean] if found and is_rival else [])
    scores = list({score.name: score for _, score, *_ in tasks}.values())
    ends = [_mean_cells(means, len(tasks), scores[0])] if len({score.best for score in scores}) == 1 else []
    none = TableCell(text=UNKNOWN)
    rows = [[cell, *(column.get(label, none) for column in (*columns, *ends))] for label, cell in labels.items()]
    headings = [task if score.title == "accuracy" else f"{task} ({score.title})" for task, score, *_ in tasks]
    dagger = any("†" in cell.text for row in rows for cell in row)
    fewer = [f"{task}: {note}" for task, _, groups, _ in tasks for note in _fewer(groups)]
    return Table(
        title=f"final {'scores' if PERPLEXITY in scores else 'accuracy'}, personalised",
        headings=["configuration", *headings, *(["mean"] if ends else [])],
        rows=rows,
        notes=[*([NO_RUN_IS_FINISHED] if dagger else []), *less_is_better(scores), *fewer],
    )


def _mean_cells(means: Mapping[str, Sequence[float]], num_tasks: int, score: Score) -> dict[str, TableCell]:
    """Means over all tasks by the configuration's label, where there is one."""
    whole = {label: f"{sum(known) / num_tasks:.3f}" for label, known in means.items() if len(known) == num_tasks}
    best = score.best_of(map(float, whole.values())) if len(whole) > 1 else math.nan
    return {label: TableCell(text=text, is_best=float(text) == best) for label, text in whole.items()}


def stat_text(found: Stat | None, unit: Unit, runs: int) -> str:
    """Mean and deviation, and of how many of the runs they are if not of all."""
    if found is None:
        return UNKNOWN
    deviation = "" if math.isnan(found.deviation) else f" ± {unit.text(found.deviation)}"
    return unit.text(found.mean) + deviation + (f" ({found.runs} of {runs})" if found.runs < runs else "")


def score_columns(scores: Sequence[Score], budget: float | None) -> list[Column]:
    """The task's scores, the leading one first; personalised, of the server's, of the held-out devices."""
    columns: list[Column] = []
    for score in scores:
        own, *others = _views(score)
        columns.append(own)
        if score is scores[0] and budget is not None:
            within = f"{score.title} within {unit_for('bytes', [budget]).full_text(budget)}"
            columns.append(Column(heading=within, key="at_equal_bytes", quantity="score", best=score.best))
        columns += others
    return columns


def _views(score: Score, prefix: str = "") -> list[Column]:
    """A score's columns: personalised, and what else there is."""
    return [
        Column(
            heading=f"{score.title}, {words}" if behind else score.title,
            key=f"{prefix}{score.name}{behind}",
            quantity="score",
            best=score.best,
        )
        for behind, words in VIEWS.items()
    ]


def best_columns(lead: Score) -> list[Column]:
    """The best evaluation of the leading score; when that was, of the global one; how steady the last are."""
    return [
        *_views(lead, "best_"),
        Column(heading="after round", key="best_round", quantity="rounds"),
        Column(
            heading=f"deviation of {lead.title}, global, over the last five evaluations",
            key="last_five_deviation",
            quantity="score",
            best="lowest",
        ),
    ]


def less_is_better(scores: Sequence[Score]) -> list[str]:
    """A note on those of which the lowest is the best, if there are any."""
    titles = [score.title for score in scores if score.best == "lowest"]
    return [f"{', '.join(titles)}: less is better"] if titles else []


LOSS = Column(heading="training loss", key="loss", quantity="score")
EPSILON = Column(heading="epsilon", key="epsilon", quantity="score")
COST = (
    Column(heading="rounds", key="rounds", quantity="rounds"),
    Column(heading="local steps", key="steps", quantity="steps"),
    Column(heading="bytes", key="bytes", quantity="bytes"),
    Column(heading="time", key="seconds", quantity="seconds"),
    Column(heading="time of slowest devices", key="seconds_slowest_device", quantity="seconds"),
    Column(heading="simulated time", key="seconds_simulated", quantity="seconds"),
    Column(heading="rounds skipped", key="skipped_rounds", quantity="rounds"),
)
TO_TARGET = (
    Column(heading="rounds", key="rounds_to_target", quantity="rounds", best="lowest"),
    Column(heading="local steps", key="steps_to_target", quantity="steps", best="lowest"),
    Column(heading="bytes", key="bytes_to_target", quantity="bytes", best="lowest"),
    Column(heading="time", key="seconds_to_target", quantity="seconds", best="lowest"),
    Column(
        heading="time of slowest devices", key="seconds_slowest_device_to_target", quantity="seconds", best="lowest"
    ),
    Column(heading="simulated time", key="seconds_simulated_to_target", quantity="seconds", best="lowest"),
)
SPREAD = (
    Column(heading="mean of devices", key="device_mean", quantity="score", best="highest"),
    Column(heading="deviation", key="device_deviation", quantity="score", best="lowest"),
    Column(heading="worst tenth", key="device_worst", quantity="score", best="highest"),
    Column(heading="best tenth", key="device_best", quantity="score"),
)
