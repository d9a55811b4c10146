"""Published figures beside those of runs: a reference file, and what it has on each configuration."""

import csv
import io
import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedhpc.commands.report.groups import Group, Stat, task_scores
from fedhpc.commands.report.parts import TaskPart
from fedhpc.commands.report.tables import (
    NO_RUN_IS_FINISHED,
    UNKNOWN,
    Table,
    TableCell,
    name_cell,
    stat_text,
)
from fedhpc.commands.report.units import unit_for
from fedhpc.config.file import known_keys, suggestion
from fedhpc.data.tasks import TASKS
from fedhpc.errors import ReportError
from fedhpc.evaluate.scores import GLOBAL, HELD_OUT, known_scores
from fedhpc.yaml_files import YAML_ERRORS, read_value

COLUMNS = ("task", "metric", "statistic", "value", "source")
STATISTICS = {
    "best personalised": ("best_", ""),
    "best global": ("best_", GLOBAL),
    "best held out": ("best_", HELD_OUT),
    "last personalised": ("", ""),
    "last global": ("", GLOBAL),
    "last held out": ("", HELD_OUT),
}
"""Which evaluation a figure is of -> what stands before and behind the metric in the name of ours."""
MODEL = "model.name"
SCORE = unit_for("score", ())
LINES_NAMED = 10


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A row of the file."""

    line: int = field(compare=False)
    task: str
    metric: str
    statistic: str
    value: float = field(compare=False)
    source: str
    settings: Mapping[str, Any]
    """Dotted key -> value that a configuration has to have."""

    @property
    def key(self) -> str:
        """The name of the same figure of ours."""
        before, behind = STATISTICS[self.statistic]
        return f"{before}{self.metric}{behind}"

    def is_about(self, group: Group) -> bool:
        """Whether a group's runs are of this task and have these settings."""
        return all(
            run.task == self.task and all(_has(run.config, key, value) for key, value in self.settings.items())
            for run in group.runs
        )


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A file of published figures."""

    path: Path
    figures: Sequence[Figure]


@dataclass(frozen=True, kw_only=True)
class Match:
    """A published figure, and ours."""

    figure: Figure
    group: Group
    ours: Stat | None

    @property
    def difference(self) -> float | None:
        """Ours less the published one."""
        return self.ours.mean - self.figure.value if self.ours else None


def read_reference(path: Path, tasks: Iterable[str] = ()) -> Reference:
    """The figures of a file.

    Args:
        tasks: known beside the built-in ones.

    Raises:
        ReportError: with all that is wrong.
    """
    try:
        reader = csv.reader(io.StringIO(path.read_bytes().decode("utf-8-sig")), strict=True)
        header, rows = next(reader, []), [(reader.line_num, row) for row in reader if row]
    except OSError as error:
        raise ReportError(f"reference: {path}: cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise ReportError(f"reference: {path}: is no CSV file in UTF-8: {error}") from None
    figures: list[Figure] = []
    known = sorted({*TASKS, *tasks})
    if not (problems := list(_header_problems(header))):
        for line, row in rows:
            try:
                figures.append(_figure(line, header, row, known))
            except ValueError as error:
                problems.append(f"line {line}: {error}")
    for index, figure in enumerate(figures):
        if figure in figures[:index]:
            problems.append(f"line {figure.line}: says the same as line {figures[figures.index(figure)].line}")
    if problems:
        raise ReportError("\n  ".join([f"reference: {path}: {len(problems)} problem(s)", *problems]))
    return Reference(path=path, figures=figures)


def _header_problems(header: Sequence[str]) -> Iterator[str]:
    for name in COLUMNS:
        if name not in header:
            yield f"line 1: no column {name}; needed are {', '.join(COLUMNS)}"
    for name, count in Counter(header).items():
        if count > 1:
            yield f"line 1: column {name} stands twice"
        if name not in COLUMNS and name not in _leaves():
            yield f"line 1: column {name!r}: neither one of {', '.join(COLUMNS)} nor a key of a configuration" + (
                suggestion(name) if "." in name else ""
            )


def _figure(line: int, header: Sequence[str], row: Sequence[str], tasks: Collection[str]) -> Figure:
    """A row; ValueError with what is wrong with it."""
    if len(row) != len(header):
        raise ValueError(f"{len(row)} columns, expected {len(header)}: {', '.join(header)}")
    texts = {name: text.strip() for name, text in zip(header, row, strict=True)}
    scores = known_scores()
    for name, valid in (("task", tasks), ("metric", scores), ("statistic", STATISTICS)):
        if texts[name] not in valid:
            raise ValueError(f"{name}: {texts[name]!r} is none of {', '.join(valid)}")
    if not texts["source"]:
        raise ValueError("source: is required: where the figure was published")
    score = scores[texts["metric"]]
    try:
        value = float(texts["value"])
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and score.least <= value <= score.most):
        raise ValueError(f"value: {texts['value']!r} is no number from {score.least:g} to {score.most:g}")
    settings = {}
    for key in (key for key in header if key in _leaves() and texts[key]):
        try:
            settings[key] = read_value(texts[key])
        except YAML_ERRORS as error:
            raise ValueError(f"{key}: {texts[key]!r} is no value: {error}") from None
    return Figure(line=line, value=value, settings=settings, **{key: texts[key] for key in COLUMNS if key != "value"})


def _has(config: Mapping[str, Any], key: str, wanted: Any) -> bool:
    """Whether a configuration has a setting; a model is the same wherever its folder is."""
    if key == MODEL:
        return _last_part(config.get(key)) == _last_part(wanted)
    return bool(config.get(key) == wanted)


def _last_part(name: Any) -> str:
    return str(name).rstrip("/").rpartition("/")[2]


def find_matches(reference: Reference, parts: Sequence[TaskPart]) -> list[Match]:
    """Every published figure of every configuration, in the order of the report."""
    return [
        Match(figure=figure, group=group, ours=summary.get(figure.key))
        for part in parts
        for group, summary in zip(part.groups, part.summaries, strict=True)
        for figure in reference.figures
        if figure.is_about(group)
    ]


def published_table(reference: Reference, matches: Sequence[Match]) -> Table:
    """Configuration by configuration, ours and what was published."""
    notes = (
        ["ours: mean ± standard deviation over seeds; difference: ours less the published figure"] if matches else []
    )
    if any(not match.group.is_finished for match in matches):
        notes.append(NO_RUN_IS_FINISHED)
    matched = {match.figure.line for match in matches}
    if lines := [str(figure.line) for figure in reference.figures if figure.line not in matched]:
        more = f" and {len(lines) - LINES_NAMED} more" if len(lines) > LINES_NAMED else ""
        named = ", ".join(lines[:LINES_NAMED])
        notes.append(f"{len(lines)} of {reference.path.name}'s figures are of none of these runs: line {named}{more}")
    if not reference.figures:
        notes.append(f"{reference.path.name} holds no figures")
    return Table(
        title="beside published figures",
        headings=["configuration", "task", "metric", "ours", "published", "difference", "source"],
        rows=[list(_cells(match)) for match in matches],
        notes=notes,
    )


def _cells(match: Match) -> Iterator[TableCell]:
    figure = match.figure
    titles = {name: score.title for name, score in known_scores().items()}
    titles |= {score.name: score.title for score in task_scores([match.group])}
    words = f"{titles[figure.metric]}, {figure.statistic}"
    yield name_cell(match.group)
    for text in (
        *(figure.task, words, stat_text(match.ours, SCORE, len(match.group.counted)), SCORE.text(figure.value)),
        *(UNKNOWN if match.difference is None else f"{match.difference:+.{SCORE.decimals}f}", figure.source),
    ):
        yield TableCell(text=text)


def published_csv(matches: Sequence[Match]) -> str:
    """The same with every digit."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    ours = ("ours_mean", "ours_sd", "ours_n")
    writer.writerow(["task", "configuration", "metric", "statistic", *ours, "published", "difference", "source"])
    for match in matches:
        figure = match.figure
        numbers = [*(match.ours or ("", math.nan, 0)), figure.value, match.difference, figure.source]
        values = [figure.task, match.group.label, figure.metric, figure.statistic, *numbers]
        writer.writerow(["" if isinstance(value, float) and math.isnan(value) else value for value in values])
    return stream.getvalue()


def _leaves() -> set[str]:
    """Keys of a configuration that have a value."""
    keys = known_keys()
    return {key for key in keys if not any(other.startswith(f"{key}.") for other in keys)}
