"""What trackers have in common: numbers and hyper-parameters by name, an id that outlives a process, checks."""

import json
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fedhpc.config import Config, flatten
from fedhpc.errors import ConfigError, first_line
from fedhpc.files import check_folder, write_whole
from fedhpc.job.run_files import RunFiles


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Every number of a round but its index, nested ones as `seconds/local`; lists, of devices, are left out."""
    flat = {name.replace(".", "/"): value for name, value in flatten(dict(metrics)).items() if name != "round"}
    return {name: value for name, value in flat.items() if isinstance(value, int | float)}


def hyper_parameters(run: Config) -> dict[str, bool | int | float | str]:
    """Dotted key -> value of a run's configuration; what is no text, number or truth value as JSON.

    Under `privacy` without the seed: who knows it takes the noise away.
    """
    flat = flatten(run.model_dump(exclude={"trackers", "seed"} if run.privacy.is_on else {"trackers"}))
    return {key: value if isinstance(value, int | float | str) else json.dumps(value) for key, value in flat.items()}


def title(run_dir: Path) -> str:
    """What a run is called."""
    return run_dir.resolve().name


def next_round(earlier: Any) -> int:
    """The round that comes after those, counted from 0."""
    return int(earlier[-1]["round"]) + 1 if earlier else 0


def remembered(run_dir: Path, kind: str, make: Callable[[], str]) -> str:
    """A run's id with a tracker: of its own until it begins anew.

    Args:
        make: gives a new one.
    """
    file = RunFiles(run_dir).trackers / f"{kind}.id"
    if file.exists():
        return file.read_text()
    found = make()
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, found.encode())
    return found


def load_package(kind: str, module: str | None = None) -> None:
    """Import a tracker's package, which has its name, so that no round and no end of a run waits for that.

    Args:
        module: in it, where the package alone is not what takes its time.

    Raises:
        ConfigError: it is not there, or not whole.
    """
    need = f"trackers: {kind} needs a package of this name: pip install 'fedhpc[{kind}]'"
    found = find_spec(kind)
    if found is None or found.origin is None:  # a mere folder of this name, as wandb leaves one, has no origin
        raise ConfigError(need)
    try:
        import_module(module or kind)
    except Exception as error:
        raise ConfigError(f"{need}; the one that is there: {type(error).__name__}: {first_line(error)}") from None


def check_writable(kind: str, folder: Path) -> None:
    """Raise ConfigError unless files can be written into a folder, which may be yet to be made."""
    try:
        check_folder(folder)
    except OSError as error:
        raise ConfigError(f"trackers: {kind}: {folder} cannot be written: {error.strerror}") from None
