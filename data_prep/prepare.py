"""Turn a labelled text data set into prepared data: template applied, tokenised for one model.

    python data_prep/prepare.py --task rte --source data/rte --model roberta-base --out prepared/rte-roberta

The source is a folder with the task's original files (TSV, unquoted, or JSON lines), a folder written by
``datasets.save_to_disk``, or a data set of the Hugging Face hub (``OWNER/NAME`` or ``OWNER/NAME:CONFIGURATION``).
"""

import argparse
import sys
from collections.abc import Sequence

from fedhpc.commands.arguments import positive_number
from fedhpc.data.preparing import Recipe, prepare
from fedhpc.data.tasks import TASKS
from fedhpc.job.console import run_command


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Prepare a labelled text data set for fedhpc.")
    parser.add_argument("--task", required=True, help=f"one of {', '.join(TASKS)}, or a task file (YAML)")
    parser.add_argument("--source", required=True, help="folder of original files or from save_to_disk, or hub id")
    parser.add_argument("--model", required=True, help="folder or hub name of the backbone")
    parser.add_argument("--out", required=True, help="directory to write; an earlier prepared one is replaced")
    parser.add_argument("--head", choices=("verbalizer", "linear"), default="verbalizer")
    parser.add_argument(
        "--max-length", type=positive_number, default=128, help="longest example in tokens (%(default)s)"
    )
    parser.add_argument("--limit-train", type=positive_number, help="take so many random training examples")
    parser.add_argument("--seed", type=int, default=42, help="for --limit-train (%(default)s)")
    parser.add_argument(
        "--validation",
        metavar="SPLIT",
        help="the source's split to evaluate on, as `test` (default: dev or validation)",
    )

    def command() -> int:
        print(prepare(Recipe(**vars(parser.parse_args(argv)))))
        return 0

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
