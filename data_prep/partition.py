"""The former name of `fedhpc partition`."""

import sys
from collections.abc import Sequence

from fedhpc.commands import cli


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return cli.main(["partition", *(sys.argv[1:] if argv is None else argv)], prefix="")


if __name__ == "__main__":
    sys.exit(main())
