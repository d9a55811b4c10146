"""What can be written on the command line: commands, options, and their help."""

import argparse
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import fedhpc
from fedhpc.commands.submit.request import duration, gigabytes, word
from fedhpc.data.tasks import GENERATION_TASKS, TASKS
from fedhpc.job.environment import SCHEDULERS
from fedhpc.job.job_files import SWEEP_FILE

EPILOG = (
    "exit status: 0 done; 2 the command line, configuration, data or checkpoint is at fault, or the run diverged; 75 "
    "stopped on request, run again to go on; anything else is a failure"
)
ANSWERING = ("max_new_tokens", "temperature", "top_p")
"""Options of `fedhpc predict` for runs that generate text."""
SWEEP_EPILOG = (
    "exit status: 0 no cell failed; 1 some failed, they are listed; 2 the experiment is at fault, nothing was run; "
    "75 stopped on request, run again to go on"
)
DOCTOR_EPILOG = (
    "exit status: 0 all is well, or there are warnings; 1 there are problems; 2 the command line is at fault"
)


def make_parser(actions: Mapping[str, Callable[[argparse.Namespace], int]]) -> argparse.ArgumentParser:
    """The parser; what it makes of a command line has the command's action in ``action``."""
    parser = argparse.ArgumentParser(
        prog="fedhpc", description="Federated prompt tuning of large language models over MPI.", epilog=EPILOG
    )
    parser.add_argument("--version", action="version", version=f"fedhpc {fedhpc.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in (
        _init,
        _prepare,
        _partition,
        _plan,
        _run,
        _submit,
        _inspect,
        _report,
        _export,
        _predict,
        _sweep,
        _watch,
        _keys,
        _completion,
        _doctor,
    ):
        add(commands)
    for name, command in commands.choices.items():
        command.set_defaults(action=actions[name])
    return parser


def _init(commands: Any) -> None:
    command = commands.add_parser(
        "init",
        help="a task, a run and a SLURM job for your own data",
        description="Look at your data and write NAME.task.yaml, NAME.yaml and NAME.slurm here, with comments.",
    )
    command.add_argument("name", metavar="NAME", help="of the task, and so of the files; none is overwritten")
    command.add_argument(
        "--data",
        nargs="+",
        required=True,
        metavar="PATH",
        help="a folder with train.tsv and dev.tsv, or both files; .csv, .jsonl and .parquet do as well; of texts to be "
        "generated one file will do",
    )
    command.add_argument("--model", required=True, help="folder or hub name of the backbone")
    command.add_argument(
        "--text", nargs="+", default=[], metavar="COLUMN", help="columns of text, those before the response; found out"
    )
    answer = command.add_mutually_exclusive_group()
    answer.add_argument("--label", metavar="COLUMN", help="the labels' column (default: the one called so)")
    answer.add_argument(
        "--response",
        metavar="COLUMN",
        help="the column of texts to be generated, or of conversations (default: response, output, messages)",
    )


def _prepare(commands: Any) -> None:
    command = commands.add_parser(
        "prepare",
        help="a text data set, tokenised for one model",
        description="Prepare a text data set: template applied, tokenised for one model, checked.",
    )
    command.add_argument(
        "--task", required=True, help=f"one of {', '.join([*TASKS, *GENERATION_TASKS])}, or a task file (YAML)"
    )
    command.add_argument(
        "--source",
        required=True,
        help="folder with TSV, CSV, JSON lines or Parquet or from datasets.save_to_disk, or a data set of the Hugging "
        "Face hub",
    )
    command.add_argument("--model", required=True, help="folder or hub name of the backbone")
    command.add_argument("--out", required=True, help="directory to write; an earlier prepared one is replaced")
    command.add_argument("--head", choices=("verbalizer", "linear"), help="of a classification (verbalizer)")
    command.add_argument(
        "--max-length", type=positive_number, default=128, help="longest example in tokens (%(default)s)"
    )
    command.add_argument(
        "--overlong",
        choices=("drop", "cut-prompt", "cut-response"),
        help="what becomes of longer texts to be generated (cut-prompt: the prompt loses its beginning)",
    )
    command.add_argument("--limit-train", type=positive_number, help="take so many random training examples")
    command.add_argument(
        "--seed",
        type=int,
        default=42,
        help="for --limit-train and held-back examples (%(default)s)",
    )
    command.add_argument(
        "--validation",
        metavar="SPLIT",
        help="the source's split to evaluate on, as `test` (default: dev or validation)",
    )


def _partition(commands: Any) -> None:
    command = commands.add_parser(
        "partition",
        help="how devices would share prepared data: a table, a picture",
        description="Preview a partition of a prepared data set.",
    )
    command.add_argument("--data", required=True, help="prepared directory")
    command.add_argument("--num-devices", type=positive_number, default=100, help="(%(default)s)")
    command.add_argument("--partition", help="federation.partition (default: dirichlet)")
    command.add_argument("--alpha", type=float, help="for dirichlet; smaller is more skewed (default: 1.0)")
    command.add_argument("--shards-per-device", type=positive_number, help="for shards (default: 2)")
    _add_set(command, "another key: federation.KEY=VALUE, or plugins=[MODULE]; repeatable")
    command.add_argument("--seed", type=int, default=42, help="the run's seed (%(default)s)")
    command.add_argument("--out", help="picture to write (.png, .svg, .pdf)")
    command.add_argument("--table", help="table of all devices to write (TSV)")


def _run(commands: Any) -> None:
    command = commands.add_parser("run", help="select layers, train, evaluate, checkpoint", epilog=EPILOG)
    _add_config(command)
    command.add_argument(
        "--resume",
        choices=("auto", "never", "require"),
        default="auto",
        help="auto (default): go on from the run directory's newest valid checkpoint, if there is one; never: refuse "
        "if there is one; require: refuse to start anew",
    )


def _submit(commands: Any) -> None:
    command = commands.add_parser(
        "submit",
        help="a run as a batch job of SLURM, PBS, LSF or Flux",
        description="Write a job file that survives preemption and time limits, show it, and submit it.",
    )
    _add_config(command)
    _add_job(command, tuple(SCHEDULERS))
    command.add_argument(
        "--chain",
        type=number_to(1000),
        default=1,
        metavar="N",
        help="so many jobs, each to go on where the one before stopped, for sites where no job is run again",
    )
    command.add_argument("--out", metavar="FILE", help="the job file (default: RUN_DIR.SCHEDULER)")
    command.add_argument("--dry-run", action="store_true", help="write the file and show it, but submit nothing")


def _plan(commands: Any) -> None:
    command = commands.add_parser("plan", help="what a run would need: bytes, memory, placement; no training")
    _add_config(command)
    command.add_argument(
        "--ranks", type=positive_number, required=True, metavar="R", help="MPI ranks, the server included"
    )
    command.add_argument(
        "--examples-per-second",
        type=positive_rate,
        metavar="X",
        help="training throughput of one rank, to estimate the time",
    )


def _inspect(commands: Any) -> None:
    command = commands.add_parser("inspect", help="a run directory or a checkpoint in words")
    command.add_argument("path")


def _report(commands: Any) -> None:
    command = commands.add_parser("report", help="a page about one or more runs, with tables as CSV and LaTeX")
    command.add_argument("run_dirs", metavar="RUN_DIR", nargs="+", type=Path)
    command.add_argument(
        "--out", metavar="FILE.html", type=Path, required=True, help="the page; the tables go beside it"
    )
    command.add_argument(
        "--target",
        type=positive_rate,
        metavar="X",
        help="accuracy, or other leading score, to be reached; 5 %% behind the task's best unless given",
    )
    command.add_argument(
        "--reference", metavar="FILE.csv", type=Path, help="published figures, to be set beside the runs'"
    )
    _add_set(command, "the simulated clock's, instead of the runs' own: simulation.up_mbit=10; repeatable")


def _export(commands: Any) -> None:
    command = commands.add_parser("export", help="what a run has tuned, as an adapter that Hugging Face PEFT loads")
    _add_trained(command)
    command.add_argument("--format", choices=("peft",), default="peft")
    command.add_argument("--out", required=True, metavar="DIR", help="a new or empty folder")


def _predict(commands: Any) -> None:
    command = commands.add_parser(
        "predict",
        help="class and probability for new text, or an answer to it",
        description="Writes one JSON object a text; of a run that generates text, a terminal gets the answers alone, "
        "as they come.",
    )
    _add_trained(command)
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--text",
        action="append",
        nargs="+",
        metavar="T",
        help="a text, or the user's message; for a task of several fields one for each, in the order of its template; "
        "repeatable",
    )
    source.add_argument(
        "--file",
        metavar="F",
        help="a table (.tsv or .csv with a header line; .jsonl, .json, .ndjson; .parquet), or one text a line; of "
        "conversations a table with `messages`, or one list of messages (.json)",
    )
    command.add_argument("--all-classes", action="store_true", help="also the probability of every class")
    command.add_argument(
        "--max-new-tokens", type=positive_number, metavar="N", help="of an answer (default: evaluate.max_new_tokens)"
    )
    command.add_argument("--temperature", type=float, metavar="X", help="of draws (default: evaluate.temperature)")
    command.add_argument("--top-p", type=float, metavar="X", help="of draws (default: evaluate.top_p)")
    command.add_argument("--out", metavar="FILE", help="write there, not to standard output")


def _sweep(commands: Any) -> None:
    command = commands.add_parser(
        "sweep",
        help="the runs of an experiment: a grid over keys and seeds",
        description="Run every cell of an experiment that is not done, and write its tables. The same command goes on "
        "after an interruption.",
        epilog=SWEEP_EPILOG,
    )
    command.add_argument("experiment", metavar="EXPERIMENT", type=Path, help="the experiment's YAML file")
    _add_set(command, "override a key of every cell, or of the file's prepare:; repeatable")
    command.add_argument("--out", metavar="DIR", help="instead of the file's out:; needed experiments go to DIR/needs")
    command.add_argument(
        "--sources", metavar="DIR", help="prepare each task from DIR/TASK instead of the file's source:"
    )
    command.add_argument(
        "--launch", metavar="COMMAND", help="what starts a cell's ranks, as 'mpirun -np 3'; one process unless given"
    )
    command.add_argument(
        "--jobs",
        type=positive_number,
        metavar="N",
        help="cells at once (default: 1; of an array as many as the scheduler starts)",
    )
    action = command.add_mutually_exclusive_group()
    action.add_argument(
        "--report", action="store_true", help="only write the tables of what is there, and list what failed"
    )
    action.add_argument(
        "--submit",
        nargs="?",
        const="",
        metavar="FILE",
        help="submit the cells that are not done as one job array with this job file (default: one that is made as by "
        f"`fedhpc submit`; of SLURM, where nothing is asked for, {SWEEP_FILE} or the one that fedhpc brings)",
    )
    action.add_argument(
        "--cell",
        type=int,
        metavar="N",
        help="print the log of cell N and what `fedhpc run` is given for it, a line each",
    )
    command.add_argument("--expect", metavar="DIGEST", help="with --cell: refuse if the experiment's cells are others")
    command.add_argument(
        "--dry-run",
        action="store_true",
        help="list the cells and where they stand; with --submit, write the job file and print the command",
    )
    _add_job(command.add_argument_group("with --submit"), tuple(key for key in SCHEDULERS if key != "none"))
    command.set_defaults(chain=1)


def _watch(commands: Any) -> None:
    command = commands.add_parser(
        "watch",
        help="how a run is doing: rounds, ranks, time left, stops",
        description="Show how a run is doing, from the files in its folder alone: while it runs or waits to go on, and "
        "when it has ended. On a terminal the view is renewed in place until then, or until Ctrl-C; elsewhere it is "
        "printed once. Of a sweep's folder, a line for each cell that was begun.",
    )
    command.add_argument("path", metavar="RUN_DIR", type=Path, help="a run's folder, or a sweep's")
    command.add_argument("--once", action="store_true", help="print the view once")
    command.add_argument("--json", action="store_true", help="print one JSON object, once")
    command.add_argument(
        "--every", type=positive_rate, default=2.0, metavar="SECONDS", help="between two looks (%(default)g)"
    )


def _keys(commands: Any) -> None:
    command = commands.add_parser(
        "keys",
        help="every key of a configuration with its type, default and meaning",
        description="Print the keys of a configuration, those of installed plug-ins included.",
    )
    command.add_argument("section", metavar="SECTION", nargs="?", help="of this section alone, as `server`")
    command.add_argument(
        "--plugins", metavar="MODULE", nargs="+", default=(), help="also the keys of these modules' parts"
    )


def _completion(commands: Any) -> None:
    command = commands.add_parser(
        "completion",
        help="a script that has a shell complete all this",
        description="Write a completion script: source it in the shell's start-up file, or put it where the shell "
        "looks for such files. Its first lines say where.",
    )
    command.add_argument("shell", choices=("bash", "zsh", "fish"))


def _doctor(commands: Any) -> None:
    command = commands.add_parser(
        "doctor",
        help="what this site has, and what will not work: alone, under mpirun or srun, in a job",
        description="Examine versions, MPI and launcher, memory, GPUs, network, file system and job, each within a "
        "time limit; nothing is trained. Started on several ranks, rank 0 reports for all.",
        epilog=DOCTOR_EPILOG,
    )
    command.add_argument(
        "target",
        metavar="RUN_DIR or CONFIG",
        nargs="?",
        help="a run directory, which need not be there yet, or a run's YAML file (default: the current folder)",
    )
    command.add_argument("--json", metavar="FILE", type=Path, help="also write the report as JSON, for a bug report")


def _add_trained(command: argparse.ArgumentParser) -> None:
    command.add_argument("run_dir", metavar="RUN_DIR", help="a run's folder; its newest valid checkpoint counts")
    command.add_argument(
        "--device",
        type=int,
        metavar="ID",
        help="this device's personal parameters; otherwise the global ones, untrained where they are not exchanged",
    )


def _add_job(command: argparse._ActionsContainer, schedulers: tuple[str, ...]) -> None:
    command.add_argument("--scheduler", choices=schedulers, help="(default: the first that is found here)")
    command.add_argument("--nodes", type=number_to(100_000), metavar="N", help="(1)")
    command.add_argument(
        "--ranks",
        type=number_to(1_000_000),
        metavar="R",
        help="MPI ranks in all, the server included (default: N times --ranks-per-node, or the devices of a round and "
        "one)",
    )
    command.add_argument("--ranks-per-node", type=number_to(10_000), metavar="R", help="at most")
    command.add_argument("--gpus-per-node", type=number_to(64), metavar="G", help="(none)")
    command.add_argument("--cpus-per-task", type=number_to(10_000), metavar="C", help="of a rank (device.threads)")
    command.add_argument("--memory", "--mem", type=gigabytes, metavar="SIZE", help="of a node, as 64G")
    command.add_argument("--time", "--walltime", type=duration, metavar="TIME", help="limit, as 24:00:00 or 1d12h")
    command.add_argument("--account", type=word, help="SLURM's account, LSF's project, Flux's bank")
    command.add_argument("--queue", "--partition", type=word)


def _add_config(command: argparse.ArgumentParser) -> None:
    command.add_argument("config", metavar="CONFIG", help="the run's YAML file")
    _add_set(command, "override a key of the file; repeatable")


def _add_set(command: argparse.ArgumentParser, words: str) -> None:
    command.add_argument("--set", action="append", default=[], metavar="KEY.SUB=VALUE", help=words)


def positive_number(text: str) -> int:
    """An argument that counts something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, found {text!r}")
    return int(text)


def number_to(most: int) -> Callable[[str], int]:
    """An argument that counts something of which there cannot be more than so many."""

    def number(text: str) -> int:
        if not text.isdecimal() or not 1 <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"must be a whole number from 1 to {most}, found {text!r}")
        return int(text)

    return number


def positive_rate(text: str) -> float:
    """An argument that is a number above 0."""
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not 0 < rate < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, found {text!r}")
    return rate
