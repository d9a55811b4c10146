"""A run's health in words: lines with a colour each."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fedhpc.commands.inspect import scores_text
from fedhpc.commands.watch.health import WAITING, Health, Rank
from fedhpc.commands.watch.history import Start
from fedhpc.job.progress import human_bytes

PLAIN, BOLD, GREEN, YELLOW, RED = "", "1", "32", "33", "31"
"""Colours, as terminals number them."""
OF_STATE = {"running": GREEN, "done": GREEN, "stopped": YELLOW, "not begun": YELLOW}
BAR = 24
UNITS = {"d": 86400, "h": 3600, "min": 60, "s": 1}
STARTS = 4
"""So many of the last are shown."""
STALE_S = 10.0
"""Five times what `status.json` is written in."""


@dataclass(frozen=True)
class Line:
    """A line; its text may hold anything that a file said."""

    text: str
    colour: str = PLAIN


def run_lines(health: Health) -> list[Line]:
    """All that there is to be said about a run."""
    return [line for part in (_head, _progress, _held, _history, _ranks) for line in part(health)]


def cell_lines(cells: Sequence[tuple[str, Health]]) -> list[Line]:
    """A line for each cell of a sweep, by its name; those that are done come last."""
    rows = []
    cells = sorted(cells, key=lambda cell: cell[1].state == "done")
    for name, health in cells:
        late = sum(rank.late or rank.silent for rank in health.ranks)
        score = next(iter(health.scores.items()), None)
        to_go = health.seconds_to_go
        rows.append(
            (
                health.state + (f" {span(health.silent_s)}" if health.state == "silent" else ""),
                f"{health.rounds_done}/{'?' if health.rounds is None else health.rounds}",
                f"{score[0]} {score[1]:.4f}" if score else "",
                f"{span(to_go)} to go" if to_go and health.state == "running" else "",
                f"{late} late" if late else "",
                name,
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    texts = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True) if width) for row in rows]
    counts = Counter(health.state for _, health in cells)
    head = ", ".join(f"{count} {state}" for state, count in counts.most_common())
    return [
        Line(f"{len(cells)} cells: {head}", BOLD),
        *(Line(text.rstrip(), OF_STATE.get(cell.state, RED)) for text, (_, cell) in zip(texts, cells, strict=True)),
    ]


def span(seconds: float | None) -> str:
    """125 -> '2 min 5 s'; the largest unit and the next one."""
    if seconds is None:
        return "?"
    left, parts = round(seconds), []
    for unit, size in UNITS.items():
        count, left = divmod(left, size)
        parts.append(f"{count} {unit}" if count else "")
    first = next((place for place, part in enumerate(parts) if part), None)
    return "0 s" if first is None else " ".join(filter(None, parts[first : first + 2]))


def _pace(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds < UNITS["min"] else span(seconds)


def _head(health: Health) -> Iterator[Line]:
    words = {
        "running": "running",
        "silent": f"no sign of life for {span(health.silent_s)}",
        "stopped": "stopped on request",
        "lost": "ended without a word",
    }.get(health.state, health.state)
    yield Line(f"{words}: {health.run_dir}", OF_STATE.get(health.state, RED))
    if health.why:
        asked = "a stop is requested: " if health.state in ("running", "silent") else ""
        yield _line("because", asked + health.why, YELLOW if asked or health.state == "stopped" else RED)
    if health.state in ("stopped", "lost"):
        yield _line("now", "it goes on when it is started again, as a requeued job is by itself")


def _progress(health: Health) -> Iterator[Line]:
    done, rounds = health.rounds_done, health.rounds
    text = f"{done} of {'?' if rounds is None else rounds}"
    if rounds:
        full = min(BAR, BAR * done // rounds)
        text = f"[{'#' * full}{'.' * (BAR - full)}] {text}"
    if health.seconds_a_round is not None:
        text += f", {_pace(health.seconds_a_round)} each"
    if health.seconds_to_go:
        text += f", {span(health.seconds_to_go)} to go"
    yield _line("rounds", text)
    if newest := health.newest:
        loss = newest["loss"]
        text = f"round {newest['round']}" + ("" if loss is None else f", loss {loss:.4g}")
        gone = {**newest["absent"], **({"rejected": newest["rejected"]} if newest["rejected"] else {})}
        if gone:
            text += "; devices: " + ", ".join(f"{count} {reason}" for reason, count in gone.items())
        yield _line("newest", text)
    if health.scores:
        yield _line("scores", f"{scores_text(health.scores)}, after round {health.evaluated_after}")
    if health.bytes_a_round is not None:
        yield _line("moved", f"{human_bytes(health.bytes)}, {human_bytes(health.bytes_a_round)} a round")
    if health.epsilon is not None:
        yield _line("privacy", f"epsilon {health.epsilon:.4g} so far")
    saved = health.checkpoint
    yield _line("checkpoint", f"{saved.name}, {span(saved.age_s)} old" if saved else "none")


def _held(health: Health) -> Iterator[Line]:
    if holder := health.holder:
        known = {True: "alive", False: "not alive any more", None: f"heard of {span(health.silent_s)} ago"}
        text = f"{holder.title}, process {holder.process} on {holder.host}, {known[holder.alive]}"
        yield _line("lock", text, RED if holder.alive is False else PLAIN)
    else:
        yield _line("lock", "nobody's" if health.silent_s is None else "of a process that cannot be told")
    if health.stops_in_s is not None:
        text = f"it stops itself in {span(health.stops_in_s)}{', before it is done' if health.stops_first else ''}"
        yield _line("time limit", text, _warn(health.stops_first))


def _ranks(health: Health) -> Iterator[Line]:
    if not health.ranks:
        return
    counts = Counter(
        "late" if rank.late else "waiting" if rank.doing.startswith(WAITING) else "at work"
        for rank in health.ranks
        if rank.rank > 0 or len(health.ranks) == 1
    )
    age = health.status_age_s or 0.0
    text = ", ".join(f"{count} {what}" for what, count in counts.items())
    yield _line("ranks", f"{text}; as of {span(age)} ago", _warn(age > STALE_S))
    host_width = max(len(rank.host) for rank in health.ranks)
    # Those that something is the matter with come first: a terminal may have no room for all.
    for rank in sorted(health.ranks, key=lambda rank: not (rank.late or rank.silent)):
        yield _rank_line(rank, host_width)


def _rank_line(rank: Rank, host_width: int) -> Line:
    text = f"  {rank.rank:>4}  {rank.host:<{host_width}}  {rank.doing}, {span(rank.for_s)}"
    if rank.late:
        text += "; LATE: others wait"
    if rank.silent:
        text += f"; no word for {span(rank.silent_s)}"
    return Line(text, _warn(rank.late or rank.silent))


def _history(health: Health) -> Iterator[Line]:
    starts = health.history.starts
    if starts:
        more = f", the last {STARTS}" if len(starts) > STARTS else ""
        yield _line("starts", f"{len(starts)}{more}")
    for number, start in enumerate(starts[-STARTS:], max(1, len(starts) - STARTS + 1)):
        is_last = number == len(starts)
        yield from _start_lines(start, goes_on=is_last and health.state in ("running", "silent"))
    if health.history.warnings:
        yield _line("warnings", "the last ones of log.txt")
    for warned in health.history.warnings:
        colour = YELLOW if warned.level == "WARNING" else RED
        yield Line(f"  {warned.at}  {warned.level} rank {warned.rank}: {warned.message}", colour)
    for text in health.left_out:
        yield _line("left out", text, YELLOW)


def _start_lines(start: Start, *, goes_on: bool) -> Iterator[Line]:
    job = f"{start.job} on " if start.job else ""
    yield Line(f"  {start.at}  {job}{start.host}, {start.ranks} rank(s){f', {start.how}' if start.how else ''}")
    if start.end:
        why = f": {start.why}" if start.why else ""
        colour = {"done": PLAIN, "stopped": YELLOW}.get(start.end, RED)
        yield Line(f"  {start.ended}    {start.end}{why}", colour)
    elif not goes_on:
        yield Line("                         ended without a word", RED)


def _line(title: str, text: str, colour: str = PLAIN) -> Line:
    return Line(f"{title:<11} {text}", colour)


def _warn(needed: bool) -> str:
    return YELLOW if needed else PLAIN
