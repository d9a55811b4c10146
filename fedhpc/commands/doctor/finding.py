"""What a check has found, and all that was found as a text and as JSON."""

from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

OK, WARNING, PROBLEM = "ok", "warning", "problem"
SHOWN = {OK: "ok", WARNING: "WARNING", PROBLEM: "PROBLEM"}
LONGEST_NAME = 28


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    subject: str
    name: str
    """What was looked at; one subject has it once."""
    value: str
    verdict: str = OK
    advice: str = ""
    """What to do; empty where all is well."""


@dataclass
class Report:
    """What was found so far; a later finding about the same takes an earlier one's place."""

    findings: dict[tuple[str, str], Finding] = field(default_factory=dict)

    def add(self, finding: Finding) -> None:
        """Take a finding."""
        self.findings[finding.subject, finding.name] = finding

    def count(self, verdict: str) -> int:
        """How many findings have this verdict."""
        return sum(finding.verdict == verdict for finding in self.findings.values())

    def text(self, title: str) -> str:
        """For people: subject by subject, then how many problems there are."""
        subjects = defaultdict(list)
        for finding in self.findings.values():
            subjects[finding.subject].append(finding)
        width = min(LONGEST_NAME, max((len(name) for _, name in self.findings), default=0))
        lines = [title]
        for subject, findings in subjects.items():
            lines += ["", subject]
            for each in findings:
                first, *others = each.value.splitlines() or [""]
                lines.append(f"  {SHOWN[each.verdict]:<7}  {each.name:<{width}}  {first}".rstrip())
                lines += [f"  {'':<7}  {'':<{width}}  {line}" for line in others]
                lines += [f"  {'':<7}  {'':<{width}}  -> {each.advice}"] * bool(each.advice)
        problems, warnings = (
            f"{count} {word}{'' if count == 1 else 's'}"
            for word, count in (("problem", self.count(PROBLEM)), ("warning", self.count(WARNING)))
        )
        return "\n".join([*lines, "", f"{problems}, {warnings}"])

    def as_json(self) -> list[dict[str, str]]:
        """For programs: every finding's fields."""
        return [asdict(finding) for finding in self.findings.values()]


def by_value(values: Mapping[int, Hashable]) -> str:
    """Values of ranks in words: the one that all have, or each with its ranks."""
    ranks: dict[Hashable, list[int]] = defaultdict(list)
    for rank, value in values.items():
        ranks[value].append(rank)
    if len(ranks) == 1:
        return str(next(iter(ranks)))
    return "; ".join(f"{rank_words(who)}: {value}" for value, who in ranks.items())


def rank_words(ranks: Sequence[int]) -> str:
    """Numbers of ranks, neighbours together: `ranks 0-2, 5`."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and spans[-1][1] == rank - 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    words = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
    return f"rank{'' if len(ranks) == 1 else 's'} {words}"


def by_host(facts: Mapping[int, Mapping[str, Any]]) -> Iterator[tuple[str, list[int]]]:
    """Hosts in the order of their first rank, each with its ranks."""
    hosts: dict[str, list[int]] = defaultdict(list)
    for rank, each in facts.items():
        hosts[each["host"]].append(rank)
    yield from hosts.items()


def first_of_hosts(hosts: Mapping[int, str]) -> dict[str, int]:
    """Of each host the first rank, rank 0 left out; in the order of these ranks."""
    firsts: dict[str, int] = {}
    for rank in sorted(hosts):
        if rank > 0:
            firsts.setdefault(hosts[rank], rank)
    return firsts
