"""The tables of an experiment."""

import csv
import io
import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from fedhpc.commands.report import (
    Reference,
    check_report_target,
    counted,
    deviation_of_last,
    read_reference,
    read_run,
    write_report,
)
from fedhpc.commands.sweep.experiment import FIGURES, Cell, Experiment
from fedhpc.config.sections import CLOCK
from fedhpc.data.prepared import Description
from fedhpc.data.task_files import load_task
from fedhpc.errors import ConfigError, UserError
from fedhpc.evaluate.scores import score_keys
from fedhpc.exchange.simulation import round_seconds
from fedhpc.files import check_folder, check_target, write_whole
from fedhpc.job.run_files import RunFiles

TABLE, REPORT = "results.csv", "report.html"


def check_out(experiment: Experiment) -> None:
    """See that the cells can have their folders, and the tables their files and published figures, before any is run.

    Raises:
        UserError: they cannot.
    """
    read_figures(experiment)
    try:
        check_folder(max((cell.run_dir for cell in experiment.cells), key=lambda path: len(os.fsencode(path))))
        if experiment.out.exists():
            check_target(experiment.out / TABLE)
            check_report_target(experiment.out / REPORT, with_reference=experiment.reference is not None)
    except OSError as error:
        raise ConfigError(f"out: {error.filename} cannot be written: {error.strerror}; give a folder") from None


def read_figures(experiment: Experiment) -> Reference | None:
    """The published figures that the experiment names.

    Raises:
        ReportError: with all that is wrong with them.
    """
    return None if experiment.reference is None else read_reference(experiment.reference, _tasks(experiment))


def _tasks(experiment: Experiment) -> Iterator[str]:
    """The names of the cells' tasks, as far as cells, `prepare:` and what is prepared already say them."""
    for name, entry in experiment.prepare.items():
        with suppress(UserError, OSError):  # which is said where it is prepared
            yield load_task(entry.task or name).name
    for path in {cell.config.data.path for cell in experiment.cells}:
        with suppress(UserError, OSError):
            yield Description.load(Path(path) / "description.json").task
    yield from filter(None, (cell.config.data.task for cell in experiment.cells))


def write_tables(experiment: Experiment) -> list[Path]:
    """Write what the experiment gave so far: a line for each cell, and the report of those that were begun.

    Raises:
        UserError: the report cannot be made of what is there.
    """
    rows = [{**cell.values, **results(cell, experiment.budget_bytes)} for cell in experiment.cells]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    experiment.make_folder()
    table, report = experiment.out / TABLE, experiment.out / REPORT
    write_whole(table, text.getvalue().encode())
    begun = [
        read_run(
            cell.run_dir,
            rounds=cell.config.federation.rounds,
            budget_bytes=experiment.budget_bytes,
            clock={key: getattr(cell.config.simulation, key) for key in CLOCK},
        )
        for cell in experiment.cells
        if RunFiles(cell.run_dir).rounds_recorded()
    ]
    if not begun:
        return [table]
    write_report(begun, report, experiment.target, experiment.budget_bytes, read_figures(experiment))
    return [table, report]


def results(cell: Cell, budget_bytes: float | None) -> dict[str, Any]:
    """The figures of one cell, from the rounds that the experiment has, as far as the budget goes.

    Empty where nothing was evaluated. All but seconds are the same from every run. Behind FIGURES comes every other
    score that was evaluated, the last one and the best.
    """
    rounds = counted(RunFiles(cell.run_dir).read_metrics(), cell.config.federation.rounds, budget_bytes)
    evaluated = [record for record in rounds if record.get("accuracy_global") is not None]
    last = evaluated[-1] if evaluated else {}
    best, best_global = (
        max((record[key] for record in evaluated), default=None) for key in ("accuracy", "accuracy_global")
    )
    moved = sum(record["bytes"] for record in rounds)
    seconds = round(sum(record.get("seconds", {}).get("round", 0.0) for record in rounds), 3)
    slowest = round(sum(record.get("seconds", {}).get("slowest_device", 0.0) for record in rounds), 3)
    simulated = [round_seconds(cell.config.simulation, cell.config.seed, record) for record in rounds]
    clock = None if None in simulated or not simulated else round(sum(filter(None, simulated)), 3)
    figures = (len(rounds), last.get("accuracy"), last.get("accuracy_global"), best_global, moved, seconds)
    values = np.array([record["accuracy_global"] for record in evaluated])
    deviation = None if math.isnan(spread := deviation_of_last(values)) else round(spread, 6)
    others = {}
    for key, score in score_keys(evaluated).items():
        if key not in FIGURES:
            known = [value for record in evaluated if isinstance(value := record.get(key), int | float)]
            others[key] = last.get(key)
            others[f"best_{key}"] = score.best_of(known) if known else None
    return dict(zip(FIGURES, (*figures, best, slowest, clock, deviation), strict=True)) | others
