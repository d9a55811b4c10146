"""The tables for other programs: every number as CSV, what the page shows as LaTeX."""

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence

from fedhpc.commands.report.groups import Goal, Group, leaf_name
from fedhpc.commands.report.tables import Summary, Table, TableCell

_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "–": "--",
    "\u00a0": "~",
    "±": r"$\pm$",
    "†": r"$^\dagger$",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}


def csv_text(tasks: Mapping[str, tuple[Sequence[Group], Sequence[Summary], Goal]]) -> str:
    """One line for each group: its settings, then every number as mean, deviation and number of runs."""
    groups = [(task, goal, pair) for task, (gs, ss, goal) in tasks.items() for pair in zip(gs, ss, strict=True)]
    settings = list(dict.fromkeys(key for _, _, (group, _) in groups for key in group.settings))
    keys = list(dict.fromkeys(key for _, _, (_, summary) in groups for key in summary))
    head = ["task", "configuration", *(leaf_name(key, settings) for key in settings), "runs", "finished", "target"]
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([*head, *(f"{key}{part}" for key in keys for part in ("_mean", "_sd", "_n"))])
    for task, goal, (group, summary) in groups:
        finished = sum(run.is_finished for run in group.runs)
        numbers = [value for key in keys for value in (summary.get(key) or ("", math.nan, 0))]
        values = [task, group.label, *group.settings.values(), len(group.runs), finished, goal.target, *numbers]
        writer.writerow(["" if isinstance(value, float) and math.isnan(value) else value for value in values])
    return stream.getvalue()


def latex_text(tables: Iterable[tuple[str, Table]]) -> str:
    """Tables for a paper, each with what goes before its title; they need the package booktabs."""
    return "% needs \\usepackage{booktabs}\n" + "\n".join(_latex(*named) for named in tables)


def _latex(name: str, table: Table) -> str:
    rows = [" & ".join(map(_escaped, table.headings)), *(" & ".join(map(_latex_cell, row)) for row in table.rows)]
    head, *body = (row + r" \\" for row in rows)
    caption = "; ".join([f"{name}: {table.title}", *table.notes])
    lines = [
        r"\begin{table}",
        rf"\caption{{{_escaped(caption)}}}",
        rf"\begin{{tabular}}{{l{'r' * (len(table.headings) - 1)}}}",
        *(r"\toprule", head, r"\midrule", *body, r"\bottomrule"),
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _latex_cell(cell: TableCell) -> str:
    return rf"\textbf{{{_escaped(cell.text)}}}" if cell.is_best else _escaped(cell.text)


def _escaped(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)
