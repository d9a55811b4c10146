"""Run directories as a report reads them: configuration, metrics, layers of the newest checkpoint."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from types import MappingProxyType
from typing import Any

import h5py
import numpy as np
import yaml
from numpy.typing import NDArray
from pydantic import ValidationError

from fedhpc.checkpoint.files import CheckpointFiles
from fedhpc.config import Config, flatten
from fedhpc.config.sections import SimulationConfig
from fedhpc.errors import CheckpointError, ConfigError, ReportError
from fedhpc.evaluate.scores import Score, score_keys, scores_of
from fedhpc.exchange.simulation import round_seconds
from fedhpc.job.run_files import LARGEST_NUMBER, RunFiles, rounds_of
from fedhpc.methods.fedpeptao import as_called_now, may_be_old_released
from fedhpc.yaml_files import YAML_ERRORS, text_of

Floats = NDArray[np.float64]
RoundRecord = Mapping[str, Any]
"""A round's line of metrics.jsonl."""
PHASES = ("broadcast", "local", "idle", "gather", "server", "evaluate", "checkpoint")
"""Parts of a round's seconds; together they are the round."""
MOST_LAYERS = 10_000
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True, kw_only=True)
class Layers:
    """What a checkpoint says about the layers."""

    count: int
    """Layers known of: all where they were scored, else up to the last one exchanged."""
    exchanged: tuple[int, ...]
    scores: Floats | None
    """One for each layer, where the strategy scores them."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run directory, whatever there is of it so far."""

    path: Path
    config: Mapping[str, Any]
    """Dotted key -> value."""
    records: Sequence[RoundRecord]
    """Lines of metrics.jsonl by ascending round."""
    is_cut: bool = False
    """Whether the rounds after these are left out, as beyond a budget of bytes."""

    @property
    def seed(self) -> int | None:
        """The run's seed."""
        return self.config.get("seed")

    @property
    def task(self) -> str:
        """The task's name; of runs whose configuration does not say it, the folder of prepared data."""
        return str(self.config.get("data.task") or self.config.get("data.path", "unknown"))

    @property
    def rounds_done(self) -> int:
        """Rounds recorded."""
        return int(self.records[-1]["round"]) + 1 if self.records else 0

    @property
    def rounds_wanted(self) -> int:
        """Rounds that the configuration asks for, or has a budget for."""
        return rounds_of(self.records, int(self.config.get("federation.rounds", 0)), self.config.get("privacy.epsilon"))

    @property
    def is_finished(self) -> bool:
        """Whether all rounds are done, or all that count."""
        return self.is_cut or (self.rounds_done > 0 and self.rounds_done >= self.rounds_wanted)

    @property
    def is_evaluated(self) -> bool:
        """Whether any round was."""
        return any(record.get("accuracy") is not None for record in self.records)

    @cached_property
    def scores(self) -> list[Score]:
        """What was evaluated, the score that leads first."""
        return scores_of(self.records)

    @cached_property
    def score_keys(self) -> dict[str, Score]:
        """Every score's keys in the records -> the score."""
        return score_keys(self.records)

    def column(self, key: str) -> Floats:
        """A number of every record; NaN where there is none."""
        return np.array([_number(record.get(key)) for record in self.records])

    def phase(self, name: str) -> Floats:
        """Seconds of every round in one phase, or in the whole `round`; waiting is not part of `local` here."""
        seconds = [record.get("seconds") or {} for record in self.records]
        values = np.array([_number(phases.get(name, 0.0)) for phases in seconds])
        return values - self.phase("idle") if name == "local" else values

    @cached_property
    def rounds(self) -> Floats:
        """Rounds completed at the end of every record."""
        return self.column("round") + 1

    @cached_property
    def bytes(self) -> Floats:
        """Bytes moved between devices and server up to the end of every record."""
        return np.cumsum(np.nan_to_num(self.column("bytes")))

    @cached_property
    def steps(self) -> Floats:
        """Local steps of all devices up to the end of every record."""
        return np.cumsum(np.nan_to_num(self.column("steps")))

    @cached_property
    def seconds(self) -> Floats:
        """Seconds spent in rounds up to the end of every record."""
        return np.cumsum(np.nan_to_num(self.phase("round")))

    @cached_property
    def seconds_slowest_device(self) -> Floats:
        """Sum of every round's slowest device's local seconds up to the end of every record, as papers count time."""
        return np.cumsum(np.nan_to_num(self.phase("slowest_device")))

    @property
    def simulation(self) -> SimulationConfig:
        """The clock of the simulated time; none where the configuration's cannot be understood."""
        start = "simulation."
        values = {key.removeprefix(start): value for key, value in self.config.items() if key.startswith(start)}
        try:
            return SimulationConfig.model_validate(values)
        except ValidationError:
            return SimulationConfig()

    @cached_property
    def seconds_simulated(self) -> Floats:
        """Seconds of the rounds by the simulated clock up to the end of every record; 0 without one."""
        simulation = self.simulation
        seconds = [round_seconds(simulation, self.seed or 0, record) for record in self.records]
        return np.cumsum([0.0 if None in seconds else value for value in seconds])

    @cached_property
    def device_accuracy(self) -> Floats:
        """Accuracies of the devices that have examples to be evaluated on, at the latest evaluation; or empty."""
        lists = [record["device_accuracy"] for record in self.records if record.get("device_accuracy")]
        return np.array([value for value in lists[-1] if value is not None], float) if lists else np.empty(0)

    @cached_property
    def layers(self) -> Layers | None:
        """The layers in the newest checkpoint that can be read."""
        return CheckpointFiles(self.path).newest_readable(_layers)


def read_run(
    path: Path,
    *,
    rounds: int | None = None,
    budget_bytes: float | None = None,
    clock: Mapping[str, Any] = MappingProxyType({}),
) -> Run:
    """One run directory.

    Args:
        clock: keys of the simulation and their values, instead of the run's own.
        rounds: those that count, instead of all that were run for.
        budget_bytes: the run counts up to its last round within it.

    Raises:
        CheckpointError: it is none, or its configuration cannot be read.
        ReportError: the run cannot have that clock.
    """
    files = RunFiles(path)
    if not files.config.is_file():
        found = "holds no config.yaml" if path.is_dir() else "is no folder"
        raise CheckpointError(f"{path} {found}; give run directories of fedhpc run")
    values = read_config(files.config)
    config = values | ({} if rounds is None else {"federation.rounds": rounds})
    if may_be_old_released(config):
        saved = CheckpointFiles(path).newest_readable(lambda file: json.loads(file.attrs["config"]))
        config |= as_called_now(saved) if saved is not None else {}
    anew = {key: value for name, value in clock.items() if config.get(key := f"simulation.{name}") != value}
    recorded = files.read_metrics()
    if anew and (what := _decided_by_clock(config, recorded)):
        raise ReportError(f"--set {next(iter(anew))}: the run in {path} went by {what}; it keeps its clock")
    config |= anew
    records = counted(recorded, rounds, budget_bytes)
    return Run(path=path, config=config, records=records, is_cut=len(records) < len(counted(recorded, rounds, None)))


def read_config(path: Path) -> dict[str, Any]:
    """A run's configuration, by dotted key.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        values = yaml.load(text_of(path), _LOADER)
    except (OSError, *YAML_ERRORS) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: must hold keys and values, found {type(values).__name__}")
    with suppress(ValidationError, ConfigError):  # keys that came later than the run have their defaults
        values = Config.model_validate(values).model_dump()
    return flatten(values)


DECIDED_BY_CLOCK = {"simulation.deadline_s": "a deadline", "simulation.over_selection": "over-selection"}
"""Keys that make the simulated clock determine a run's numbers -> what they are called."""


def _decided_by_clock(config: Mapping[str, Any], records: Sequence[RoundRecord]) -> str | None:
    """What of a run followed from its simulated clock, if anything but the time."""
    if any("between_steps_s" in record for record in records):
        return "the order of arrival"
    return next((what for key, what in DECIDED_BY_CLOCK.items() if config.get(key)), None)


def counted(records: Sequence[RoundRecord], rounds: int | None, budget_bytes: float | None) -> Sequence[RoundRecord]:
    """The first rounds of a run, of these those until which no more bytes were moved; None: no such limit."""
    first = [record for record in records if rounds is None or record["round"] < rounds]
    if budget_bytes is None:
        return first
    moved = accumulate(record["bytes"] for record in first)
    return [record for record, so_far in zip(first, moved, strict=True) if so_far <= budget_bytes]


def _layers(file: h5py.File) -> Layers:
    exchanged = tuple(int(layer) for layer in file["selection/layers"][:])
    scores = file["selection/scores"][:].astype(float) if "selection/scores" in file else None
    count = max(exchanged, default=-1) + 1 if scores is None else len(scores)
    if count > MOST_LAYERS:
        raise ValueError(f"{count} layers are more than any model has")
    return Layers(count=count, exchanged=exchanged, scores=scores)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and abs(value) <= LARGEST_NUMBER else float("nan")
