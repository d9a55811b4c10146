"""The job file of a run: one template for all schedulers, and a small one for each."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import jinja2

from fedhpc.commands.submit.request import Request
from fedhpc.errors import ConfigError
from fedhpc.job.environment import SCHEDULERS
from fedhpc.job.job_files import COMMAND, TEMPLATES

MARK = "by `fedhpc submit`"
"""In the second line of every job file; another file is not overwritten."""


def job_file(key: str, request: Request, config: Path, overrides: Sequence[str], path: Path) -> str:
    """A job file's text.

    Args:
        key: of the scheduler.
        config: the run's YAML file.
        overrides: KEY.SUB=VALUE, as of `--set`.
        path: where it will be.

    Raises:
        ConfigError: a name would break the file.
    """
    for name in (str(config), str(path)):
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
    scheduler = SCHEDULERS[key]
    by_hand = [*scheduler.submission(), *(["<"] if scheduler.file_is_input else []), shlex.quote(str(path))]
    run = [str(config), *(part for override in overrides for part in ("--set", override))]
    in_checkout = Path("jobs/launch.sh").is_file()
    return environment.get_template(f"job.{key}.j2").render(
        key=key,
        asked=request,
        name=f"fedhpc-{re.sub('[^A-Za-z0-9.-]', '_', config.stem)}",
        mark=MARK,
        config=config,
        path=path,
        by_hand=" ".join(by_hand),
        quoted_path=shlex.quote(str(path)),
        command=None if in_checkout else shlex.quote(COMMAND),
        launch=shlex.quote("jobs/launch.sh" if in_checkout else str(TEMPLATES / "launch.sh")),
        arguments=shlex.join(run),
    )
