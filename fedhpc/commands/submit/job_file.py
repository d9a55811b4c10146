"""The job file of a run, or of an experiment's array: one template for all schedulers, and a small one for each."""

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from fedhpc.commands.submit.request import Request
from fedhpc.errors import ConfigError
from fedhpc.job.environment import SCHEDULERS
from fedhpc.job.job_files import COMMAND, TEMPLATES

MARK = "written by `fedhpc"
"""In the second line of every job file; another file is not overwritten."""


def job_file(key: str, request: Request, config: Path, overrides: Sequence[str], path: Path) -> str:
    """A run's job file.

    Args:
        key: of the scheduler.
        config: the run's YAML file.
        overrides: KEY.SUB=VALUE, as of `--set`.
        path: where it will be.

    Raises:
        ConfigError: a name would break the file; or not all programs can be named.
    """
    scheduler = SCHEDULERS[key]
    by_hand = [*scheduler.submission(), *(["<"] if scheduler.file_is_input else []), shlex.quote(str(path))]
    run = [str(config), *(part for override in overrides for part in ("--set", override))]
    return _job_file(key, request, config, path, "launch.sh", shlex.join(run), by_hand=" ".join(by_hand))


def array_file(key: str, request: Request, experiment: Path, options: Sequence[str], path: Path) -> str:
    """The job file of an experiment's array, or of each of its cells; see `job_file`.

    Args:
        options: of `fedhpc sweep` for this experiment.
    """
    by_hand = shlex.join(["fedhpc", "sweep", str(experiment), *options, "--scheduler", key, "--submit", str(path)])
    return _job_file(key, request, experiment, path, "cell.sh", '"$@"', by_hand=by_hand)


def job_name(file: Path) -> str:
    """Of the job that runs what is in a file."""
    return f"fedhpc-{re.sub('[^A-Za-z0-9.-]', '_', file.stem)}"


def _job_file(
    key: str, request: Request, source: Path, path: Path, script: str, arguments: str, *, by_hand: str
) -> str:
    import jinja2  # noqa: PLC0415 - the command line is read without it, on every rank

    for name in (str(source), str(path)):
        if not name.isprintable():
            raise ConfigError(f"{name!r}: a job file names it in a comment, which a line break would end; rename it")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    in_checkout = Path("jobs/launch.sh").is_file()
    if not in_checkout and " " in f"{sys.executable}{TEMPLATES}":
        raise ConfigError(
            f"{sys.executable}: job files call it, and cannot where its path or that of {TEMPLATES} has a blank; "
            "install fedhpc elsewhere, or submit from a checkout"
        )
    return environment.get_template(f"job.{key}.j2").render(
        key=key,
        asked=request,
        name=job_name(source),
        array=script == "cell.sh",
        source=source,
        by_hand=by_hand,
        quoted_path=shlex.quote(str(path)),
        command=None if in_checkout else shlex.quote(COMMAND),
        script=shlex.quote(f"jobs/{script}" if in_checkout else str(TEMPLATES / script)),
        arguments=arguments,
    )
