"""Prompts that an experiment's cells mix: exports of cells of the experiments that it needs."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fedhpc.checkpoint.files import SERVER_FILE, CheckpointFiles, read_checksums
from fedhpc.commands.sweep.experiment import Cell, Experiment, some_of
from fedhpc.commands.sweep.experiment_file import place, refusal
from fedhpc.commands.sweep.standing import standing, waiting
from fedhpc.errors import CheckpointError
from fedhpc.files import replacing, write_whole
from fedhpc.registry import TUNINGS

RECORD = "checkpoint.sha256"
"""File of an export: names the checkpoint that it was made from. An export that somebody made by hand has none."""


@dataclass(frozen=True, kw_only=True)
class Export:
    """What a needed cell gives to others."""

    needed: Experiment
    cell: Cell

    @property
    def state(self) -> str:
        """`there`, or what is to be done."""
        if not standing(self.needed, self.cell).done:
            return "after its cell"
        if not self.cell.export.is_dir():
            return "to be made"
        recorded, now = self._recorded(), _checkpoint(self.cell.run_dir)
        return "there" if None in (recorded, now) or recorded == now else "to be made anew"

    @property
    def is_due(self) -> bool:
        """Whether it is to be made now."""
        return self.state.startswith("to be made")

    def make(self) -> None:
        """Write the export, all of it or nothing, in place of an older one.

        Raises:
            UserError: the run cannot be read, or the folder not be written.
        """
        from fedhpc.commands.export import export_peft

        digest = _checkpoint(self.cell.run_dir)
        with replacing(self.cell.export) as folder:
            export_peft(str(self.cell.run_dir), str(folder))
            write_whole(folder / RECORD, f"{digest}\n".encode())

    def _recorded(self) -> str | None:
        with suppress(OSError):
            return (self.cell.export / RECORD).read_text().strip()
        return None


def find_exports(experiment: Experiment) -> list[Export]:
    """Those that the cells which are not done need.

    Raises:
        ConfigError: a source is neither there nor from a needed cell, or no prompt is tuned in that, or none is left.
    """
    sources: dict[str, list[Cell]] = {}
    for cell in waiting(experiment):
        for source in cell.config.tuning.folders:
            sources.setdefault(source, []).append(cell)
    exports = {
        place(cell.export): Export(needed=needed, cell=cell) for needed in experiment.needs for cell in needed.cells
    }
    problems = []
    for source, cells in sources.items():
        export = exports.get(place(source))
        if export is None and not Path(source).is_dir():
            problems.append(
                f"tuning.sources: {source}: is not there, and no cell of needs: is exported to it ({some_of(cells)})"
            )
        elif export and not TUNINGS[kind := export.cell.config.tuning.kind].is_prompt_before_text:
            needed = " or ".join(name for name, part in TUNINGS.items() if part.is_prompt_before_text)
            problems.append(f"tuning.sources: {source}: its cell has tuning.kind: {kind}, {needed} is needed")
        elif export and export.is_due and _checkpoint(export.cell.run_dir) is None:
            problems.append(
                f"tuning.sources: {source}: cannot be exported, {export.cell.run_dir} has no checkpoint any more; "
                "remove that folder to have the cell run anew"
            )
    if problems:
        raise refusal(experiment.path, problems)
    return [exports[found] for found in dict.fromkeys(map(place, sources)) if found in exports]


def _checkpoint(run_dir: Path) -> str | None:
    """SHA-256 of what the newest checkpoint that is listed holds of the server; None if there is none any more."""
    files = CheckpointFiles(run_dir)
    for position in files.positions():
        with suppress(CheckpointError, OSError):
            return read_checksums(files.path(position)).get(SERVER_FILE)
    return None
