"""The answers that runs wrote at their evaluations, as far as a page shows them: of so many prompts and rounds."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedhpc.commands.report.groups import Group
from fedhpc.commands.report.runs import Run
from fedhpc.errors import ConfigError
from fedhpc.evaluate.generation_metrics import GenerationMetric
from fedhpc.job.run_files import RunFiles
from fedhpc.registry import GENERATION_METRICS

MOST_PROMPTS, MOST_ROUNDS, MOST_GROUPS, MOST_REFERENCES = 20, 6, 8, 4
"""So many are shown."""
LONGEST, LONGEST_OPEN = 2000, 240
"""Characters of a text: that are shown; with which it is not folded."""
FIELDS = {"example": int, "device": int, "prompt": str, "references": list, "answer": str, "answer_personal": str}
CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"}
"""Characters that a page must not hold -> their pictures."""


@dataclass(frozen=True, kw_only=True)
class Text:
    """A text as it is shown."""

    whole: str
    beginning: str
    """To unfold the whole; empty where that is short."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What was answered after so many rounds; the device's own has a line beside, where that is another."""

    round: int
    title: str
    """When, or whose, and its scores."""
    text: Text


@dataclass(frozen=True, kw_only=True)
class Question:
    """A prompt and what was answered to it, in the order of rounds."""

    example: int
    device: int
    prompt: Text
    references: Sequence[Text]
    left_out: int
    """So many references more."""
    answers: Sequence[Answer]


@dataclass(frozen=True, kw_only=True)
class GroupAnswers:
    """Answers of one run of a group."""

    label: str
    index: int
    """Number of the group."""
    questions: Sequence[Question]
    note: str


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Answers of a task's groups."""

    rounds: Sequence[int]
    """Completed at each evaluation that is shown."""
    groups: Sequence[GroupAnswers]
    note: str


def find_answers(groups: Sequence[Group]) -> Answers | None:
    """Those of a task, of one run of each group; None where nothing was answered."""
    found: list[tuple[int, Run, list[int]]] = []
    for index, group in enumerate(groups):
        runs = ((run, _rounds(run)) for run in group.counted)
        found += [(index, run, rounds) for run, rounds in runs if rounds][:1]
    shown = _some(sorted({done for *_, rounds in found[:MOST_GROUPS] for done in rounds}))
    parts = [
        _group_answers(index, groups[index].label, run, rounds, shown) for index, run, rounds in found[:MOST_GROUPS]
    ]
    parts = [part for part in parts if part.questions]
    more = f" The first {MOST_GROUPS} of {len(found)} configurations." if len(found) > MOST_GROUPS else ""
    note = f"Of one run of each configuration; all of them are in its folder generations.{more}"
    return Answers(rounds=shown, groups=parts, note=note) if parts else None


def _rounds(run: Run) -> list[int]:
    """After how many rounds answers were written."""
    files = RunFiles(run.path)
    if not files.generations.is_dir():
        return []
    return [int(each["round"]) + 1 for each in run.records if files.answers(each["round"]).is_file()]


def _some(rounds: Sequence[int]) -> list[int]:
    """The first, the last, and evenly between."""
    places = np.linspace(0, len(rounds) - 1, min(MOST_ROUNDS, len(rounds)))
    return [rounds[place] for place in np.rint(places).astype(int)]


def _group_answers(index: int, label: str, run: Run, rounds: Sequence[int], shown: Sequence[int]) -> GroupAnswers:
    lines = {done: list(_lines(run, done)) for done in shown if done in rounds}
    lines = {done: found for done, found in lines.items() if found}
    last = lines[max(lines)] if lines else []
    by_example = {done: {line["example"]: line for line in found} for done, found in lines.items()}
    scores = _scores(run)
    questions = [
        Question(
            example=line["example"],
            device=line["device"],
            prompt=_text(line["prompt"]),
            references=[_text(reference) for reference in line["references"][:MOST_REFERENCES]],
            left_out=max(0, len(line["references"]) - MOST_REFERENCES),
            answers=[
                answer
                for done, found in by_example.items()
                if line["example"] in found
                for answer in _answers(done, found[line["example"]], scores)
            ],
        )
        for line in last[:MOST_PROMPTS]
    ]
    first = f"The first {len(questions)} of {len(last)} prompts" if len(questions) < len(last) else "All prompts"
    of = f"{len(lines)} of {len(rounds)} evaluations" if len(lines) < len(rounds) else "all evaluations"
    return GroupAnswers(label=label, index=index, questions=questions, note=f"{first}, {of}; {run.path}")


def _lines(run: Run, done: int) -> Iterator[Mapping[str, Any]]:
    """Those of a file; what is no line of answers is passed over."""
    for line in RunFiles(run.path).answers(done - 1).read_bytes().splitlines():
        with suppress(ValueError, RecursionError):
            value = json.loads(line)
            if _is_line(value):
                yield value


def _is_line(value: Any) -> bool:
    if not isinstance(value, dict) or not all(isinstance(value.get(key), kind) for key, kind in FIELDS.items()):
        return False
    references = value["references"]
    return bool(references) and all(isinstance(reference, str) for reference in references)


def _scores(run: Run) -> dict[str, GenerationMetric]:
    """Title -> metric, of those that the run has and that can be computed of one answer here."""
    found: dict[str, GenerationMetric] = {}
    for score in run.scores:
        if score.name in GENERATION_METRICS and (metric := GENERATION_METRICS[score.name]).is_of_each:
            with suppress(ConfigError):
                metric.check()
                found[score.title] = metric()
    return found


def _answers(done: int, line: Mapping[str, Any], metrics: Mapping[str, GenerationMetric]) -> Iterator[Answer]:
    texts = {f"after round {done}": line["answer"]}
    if line["answer_personal"] != line["answer"]:
        texts[f"device {line['device']}'s own"] = line["answer_personal"]
    for whose, text in texts.items():
        scores = [f"{title} {metric.score([text], [line['references']]):.2f}" for title, metric in metrics.items()]
        yield Answer(round=done, title=": ".join([whose, *filter(None, [", ".join(scores)])]), text=_text(text))


def _text(text: str) -> Text:
    visible = text.translate(CONTROLS)
    if (more := len(visible) - LONGEST) > 0:
        half = LONGEST // 2
        visible = f"{visible[:half]}\n[… {more} characters left out …]\n{visible[-half:]}"
    is_short = len(visible) <= LONGEST_OPEN and visible.count("\n") < LONGEST_OPEN // 40
    return Text(whole=visible, beginning="" if is_short else f"{visible.strip()[: LONGEST_OPEN // 2]}…")
