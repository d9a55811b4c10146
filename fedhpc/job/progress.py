"""A run's progress on the terminal."""

import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, TextIO

from tqdm import tqdm

ACCURACY = MappingProxyType({"accuracy": "accuracy"})


class Progress:
    """Rounds as they pass: a live bar on a terminal, one plain line per round elsewhere."""

    def __init__(
        self,
        earlier: Sequence[Mapping[str, Any]],
        first_round: int,
        rounds: int,
        stream: TextIO | None = None,
        *,
        titles: Mapping[str, str] = ACCURACY,
    ) -> None:
        """Begin to show.

        Args:
            earlier: the metrics of the rounds before.
            first_round: the next one to be shown, counted from 0.
            titles: of the scores that are shown, by their names in the metrics.
        """
        self.first_round, self.rounds = first_round, rounds
        self.stream = stream or sys.stdout
        self.start = time.monotonic()
        self.titles, self.scores = titles, dict.fromkeys(titles.values(), "-")
        self.bytes = 0
        for record in earlier:
            self._note(record)
        self.bar = None
        if on_terminal(self.stream):
            # The pseudo-terminal that Open MPI gives a rank has no size, and on none tqdm would show nothing.
            columns, rows = shutil.get_terminal_size((100, 24))
            self.bar = tqdm(
                total=rounds, initial=first_round, desc="round", ncols=columns, nrows=rows, file=self.stream
            )

    def update(self, record: Mapping[str, Any]) -> None:
        """Show the round whose metrics these are."""
        done = record["round"] + 1
        self._note(record)
        loss = "-" if record["loss"] is None else f"{record['loss']:.3f}"
        facts = {**self.scores, "loss": loss, "moved": human_bytes(self.bytes)}
        if "epsilon" in record:
            facts["epsilon"] = "inf" if record["epsilon"] is None else f"{record['epsilon']:.3f}"
        if self.bar is not None:
            self.bar.set_postfix(facts, refresh=False)
            self.bar.update()
            return
        elapsed = time.monotonic() - self.start
        remaining = elapsed / (done - self.first_round) * (self.rounds - done)
        text = "  ".join(f"{name} {value}" for name, value in facts.items())
        print(
            f"round {done}/{self.rounds}  {text}  ETA {tqdm.format_interval(remaining)}", file=self.stream, flush=True
        )

    def _note(self, record: Mapping[str, Any]) -> None:
        for name, title in self.titles.items():
            if isinstance(value := record.get(name), int | float):
                self.scores[title] = f"{value:.3f}" if value < 1e6 else f"{value:.3g}"
        self.bytes += record["bytes"]

    def close(self) -> None:
        """End the bar's line."""
        if self.bar is not None:
            self.bar.close()


def on_terminal(stream: TextIO) -> bool:
    """Whether a person watches this stream.

    Open MPI gives every rank a pseudo-terminal of its own, so under mpirun the launcher's output decides.
    """
    if not stream.isatty():
        return False
    if "OMPI_COMM_WORLD_SIZE" not in os.environ:
        return True
    try:
        return os.readlink(f"/proc/{os.getppid()}/fd/1").startswith(("/dev/pts/", "/dev/tty"))
    except OSError:
        return False


def human_bytes(count: float) -> str:
    """1536 -> '1.5 kB'."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
