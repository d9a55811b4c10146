"""What the scores of an evaluation are called, and which of two values is better: nothing else says so.

A line of metrics.jsonl has a score under its name, as the devices have it with their own tensors, and under its name
with GLOBAL or HELD_OUT behind.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fedhpc.registry import GENERATION_METRICS, METRICS

GLOBAL, HELD_OUT = "_global", "_held_out"
VIEWS = {"": "personalised", GLOBAL: "global", HELD_OUT: "held-out devices"}
"""What stands behind a score's name -> whose it is."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """One score."""

    name: str
    title: str
    """What people read."""
    best: Literal["highest", "lowest"] = "highest"
    least: float = 0.0
    most: float = 1.0
    """That it can be."""

    @property
    def sign(self) -> float:
        """Times a value: the more, the better."""
        return 1.0 if self.best == "highest" else -1.0

    def best_of(self, values: Iterable[float]) -> float:
        """The best of the finite values; NaN if there are none."""
        return max(filter(math.isfinite, values), key=lambda value: self.sign * value, default=math.nan)


ACCURACY = Score(name="accuracy", title="accuracy")
PERPLEXITY = Score(name="perplexity", title="perplexity", best="lowest", least=1.0, most=math.inf)
OF_TOKENS = (PERPLEXITY, Score(name="accuracy", title="token accuracy"))
"""Those of texts to be generated, beside the metrics of what is generated."""


def known_scores() -> dict[str, Score]:
    """Those that are registered, by name."""
    return {score.name: score for score in _known()}


def _known() -> Iterator[Score]:
    for own, metric in METRICS.items():
        for name in dict.fromkeys((*metric.titles, *metric.less_is_better, own)):
            title, best = metric.titles.get(name, name), _best(name in metric.less_is_better)
            yield Score(name=name, title=title, best=best, least=float(metric.lowest))
    yield PERPLEXITY
    for name, metric in GENERATION_METRICS.items():
        yield Score(name=name, title=getattr(metric, "title", name), best=_best(metric.less_is_better))


def _best(less_is_better: bool) -> Literal["highest", "lowest"]:
    return "lowest" if less_is_better else "highest"


def scores_of(records: Iterable[Mapping[str, Any]]) -> list[Score]:
    """The scores in lines of metrics.jsonl, the one that leads first: perplexity, or the task's own metric."""
    keys = (key for record in records for key in record if key.endswith(GLOBAL))
    names = dict.fromkeys(("accuracy", *(key.removesuffix(GLOBAL) for key in keys)))
    known = known_scores()
    found = {name: known.get(name, Score(name=name, title=name)) for name in names}
    if PERPLEXITY.name in found:
        return list(({score.name: score for score in OF_TOKENS} | found | {"accuracy": OF_TOKENS[1]}).values())
    return [*reversed(found.values())]


def score_keys(records: Sequence[Mapping[str, Any]]) -> dict[str, Score]:
    """The keys that the scores have in lines of metrics.jsonl -> the score; in the order of the scores, then of VIEWS.

    Personalised and global ones are always among them.
    """
    views = [view for view in VIEWS if view != HELD_OUT or any(f"accuracy{view}" in record for record in records)]
    return {score.name + view: score for score in scores_of(records) for view in views}
