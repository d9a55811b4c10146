"""The page: charts and tables of all runs, in one HTML file that needs no other."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

import fedhpc
from fedhpc.commands.report import charts, exports, tables
from fedhpc.commands.report.groups import MARGIN, Group, group_runs, leaf_name, task_scores
from fedhpc.commands.report.parts import TaskPart, task_part
from fedhpc.commands.report.published import Reference, find_matches, published_csv, published_table
from fedhpc.commands.report.runs import Run
from fedhpc.commands.report.tables import Table, TableCell
from fedhpc.commands.report.units import unit_for
from fedhpc.errors import ReportError
from fedhpc.files import check_target, write_target

ENDINGS = (".html", ".csv", ".tex")
PUBLISHED = ".published.csv"
"""Ending of the figures beside published ones, where there is a reference."""


def check_report_target(out: Path, *, with_reference: bool) -> None:
    """See that a report can be written, before there is one.

    Raises:
        ReportError: `out` does not end in .html, or one of its files cannot be written.
    """
    if out.suffix != ENDINGS[0]:
        raise ReportError(f"--out {out}: must end in .html; the tables go beside it, with .csv and .tex")
    for file in map(out.with_suffix, (*ENDINGS, PUBLISHED) if with_reference else ENDINGS):
        with _refusing(file):
            check_target(file)


def write_report(
    runs: Sequence[Run],
    out: Path,
    target: float | None = None,
    budget_bytes: float | None = None,
    reference: Reference | None = None,
) -> None:
    """Write the page, and its tables beside it with the endings .csv and .tex, and .published.csv with a reference.

    Args:
        runs: unfinished ones are marked.
        out: where the page is written; see `check_report_target`.
        target: value of the leading score to be reached; 5 % behind each task's best final value unless given.
        budget_bytes: what the runs were read with.
        reference: published figures to set beside the runs'.

    Raises:
        ReportError: `out` cannot be written.
    """
    check_report_target(out, with_reference=reference is not None)
    tasks = group_runs(runs)
    parts = [task_part(name, groups, target) for name, groups in tasks.items()]
    whole = [_overview(parts)] if len(parts) > 1 else []
    matches = find_matches(reference, parts) if reference else []
    published = [published_table(reference, matches)] if reference else []
    ending = [_configurations(parts), _runs(runs, tasks)]
    named = [
        *(("all tasks", table) for table in (*whole, *published)),
        *((part.name, table) for part in parts for table in part.tables),
    ]
    texts = (
        _html(
            runs=runs,
            parts=parts,
            whole=whole,
            published=published,
            ending=ending,
            is_given=target is not None,
            budget=budget_bytes and unit_for("bytes", [budget_bytes]).full_text(budget_bytes),
        ),
        exports.csv_text({part.name: (part.groups, part.summaries, part.goal) for part in parts}),
        exports.latex_text(named),
    )
    written = dict(zip(ENDINGS, texts, strict=True)) | ({PUBLISHED: published_csv(matches)} if reference else {})
    for file, text in ((out.with_suffix(ending), text) for ending, text in written.items()):
        with _refusing(file):
            write_target(file, text.encode(errors="backslashreplace"))  # a folder's name may be no Unicode


@contextmanager
def _refusing(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ReportError(f"--out {file}: cannot be written: {error.strerror}") from None


def _html(*, runs: Sequence[Run], parts: Sequence[TaskPart], **values: Any) -> str:
    environment = Environment(
        loader=PackageLoader("fedhpc.commands.report", ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("page.html").render(
        css=_beside("page.css"),
        js=_beside("page.js") if any(part.answers for part in parts) else "",
        key=charts.key,
        unfinished=sum(not run.is_finished for run in runs),
        most_groups=max(len(part.groups) for part in parts),
        colours=charts.COLOURS,
        margin=f"{MARGIN:.0%}",
        version=fedhpc.__version__,
        runs=runs,
        parts=parts,
        **values,
    )


def _beside(name: str) -> Markup:
    """A file that goes into the page as it is."""
    return Markup(files("fedhpc.commands.report").joinpath(name).read_text(encoding="utf-8"))


def _overview(parts: Sequence[TaskPart]) -> Table:
    return tables.overview([(part.name, task_scores(part.groups)[0], part.groups, part.summaries) for part in parts])


def _configurations(parts: Sequence[TaskPart]) -> Table:
    """The keys in which configurations differ, in full."""
    found: dict[str, dict[tuple[str, ...], list[str]]] = {}
    for part in parts:
        for group in part.groups:
            texts = tuple(map(_setting_text, group.settings.values()))
            found.setdefault(group.label, {}).setdefault(texts, []).append(part.name)
    keys = list(parts[0].groups[0].settings)
    rows = [
        [
            TableCell(text=label if len(variants) == 1 else f"{label}, {', '.join(tasks)}"),
            *(TableCell(text=text) for text in texts),
        ]
        for label, variants in found.items()
        for texts, tasks in variants.items()
    ]
    headings = ["configuration", *(leaf_name(key, keys) for key in keys)]
    return Table(title="Configurations", headings=headings, rows=rows, is_text=True)


def _setting_text(value: Any) -> str:
    return tables.UNKNOWN if value is None else str(value)


def _runs(runs: Sequence[Run], tasks: Mapping[str, Sequence[Group]]) -> Table:
    names = {id(run): (task, group.label) for task, groups in tasks.items() for group in groups for run in group.runs}
    rows = [
        [
            TableCell(text=str(run.path)),
            *(TableCell(text=name) for name in names[id(run)]),
            TableCell(text=str(run.seed)),
            TableCell(text=f"{run.rounds_done} of {run.rounds_wanted}" + ("" if run.is_finished else ", unfinished")),
        ]
        for run in runs
    ]
    return Table(title="Runs", headings=["folder", "task", "configuration", "seed", "rounds"], rows=rows, is_text=True)
