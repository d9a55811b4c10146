"""`fedhpc watch`: how a run, or each run of a sweep, is doing; from files alone."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedhpc.commands.sweep.standing import status_in
from fedhpc.commands.watch.files import Files
from fedhpc.commands.watch.health import Health, is_run_dir, look
from fedhpc.commands.watch.screen import Screen, is_live
from fedhpc.commands.watch.words import Line, cell_lines, run_lines
from fedhpc.errors import EXIT_STOPPED, CheckpointError
from fedhpc.files import names_in
from fedhpc.job.console import show

LONGEST_S = 86400.0
"""Between two looks."""


def watch_folder(path: Path, *, every_s: float, once: bool, as_json: bool) -> None:
    """Show how what is in a folder is doing; on a terminal again and again until it has ended.

    Raises:
        CheckpointError: it is the folder of no run and no sweep.
        OSError: it cannot be listed.
    """
    files = Files()
    live = is_live() and not once and not as_json
    screen = Screen(live=live)
    while True:
        view = _look(path, files)
        if as_json:
            show(json.dumps(_as_dict(path, view), allow_nan=False))
        else:
            screen.show(_lines(view))
        if not live or _is_over(path, view):
            return
        time.sleep(min(every_s, LONGEST_S))


View = Health | list[tuple[str, Health]]
"""Of a run, or of a sweep's cells with their names."""


def _look(path: Path, files: Files) -> View:
    if is_run_dir(path):
        return look(path, files)
    if cells := [(name, _cell(path, name, files)) for name in _cells(path)]:
        return cells
    if (path / "lock").exists():  # the run is setting up
        return look(path, files)
    found = "neither a run directory nor the folder of a sweep that has begun" if path.is_dir() else "is no folder"
    if not path.exists():
        found = "no such folder; a run makes it when it starts"
    raise CheckpointError(f"{path}: {found}; give a run's run_dir or a sweep's out")


def _is_over(path: Path, view: View) -> bool:
    """Whether nothing more will come by itself; a sweep that has the folder's lock begins further cells."""
    if isinstance(view, Health):
        return view.is_over
    return all(health.is_over for _, health in view) and not (path / "lock").exists()


def _cells(path: Path) -> list[str]:
    """The names of the cells that were begun; of one that was refused there is no more than its log."""
    begun = [name for name in names_in(path) if is_run_dir(path / name)]
    logs = [Path(name).stem for name in names_in(path / "logs") if name.endswith(".log")]
    return sorted({*begun, *logs})


def _cell(folder: Path, name: str, files: Files) -> Health:
    health, log = look(folder / name, files), folder / "logs" / f"{name}.log"
    status = files.read(log, _status, None)
    if health.state in ("lost", "not begun") and status not in (None, 0, EXIT_STOPPED):
        return replace(health, state="failed", why=f"exit status {status}: see {log}")
    return health


def _status(log: bytes) -> int | None:
    return status_in(log.decode(errors="replace").splitlines())


def _lines(view: View) -> list[Line]:
    return run_lines(view) if isinstance(view, Health) else cell_lines(view)


def _as_dict(path: Path, view: View) -> dict[str, Any]:
    if isinstance(view, Health):
        return view.as_dict()
    return {"folder": str(path), "cells": [{"name": name, **health.as_dict()} for name, health in view]}
