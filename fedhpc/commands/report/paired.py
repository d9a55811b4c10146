"""How far configurations are apart, seed by seed."""

import math
from collections.abc import Mapping, Sequence

from fedhpc.commands.report.groups import Group, Stat, final, stat
from fedhpc.commands.report.tables import Table, TableCell, less_is_better, name_cell
from fedhpc.evaluate.scores import Score

SIGNIFICANT, POWERFUL = 1.96, 0.84
"""Quantiles of the normal distribution: of a test at 5 %, two-sided, and of 80 %."""
FEWEST_SEEDS, MOST_SEEDS = 3, 100
"""Two differences never tell enough, and more seeds would not be run."""


def paired_table(groups: Sequence[Group], score: Score) -> Table | None:
    """Each configuration's difference to the best with several seeds; None where none has two in common with it.

    Runs of one seed share partition, sampled devices and batches, so their difference varies less than they do.
    """
    finished = [group for group in groups if group.is_finished]
    values = [_by_seed(group, score.name) for group in finished]
    means = [score.sign * sum(found.values()) / len(found) if len(found) > 1 else -math.inf for found in values]
    rows = []
    for group, found in zip(finished, values, strict=True):
        best = values[means.index(max(means))]
        seeds = found.keys() & best.keys()
        difference = stat(found[seed] - best[seed] for seed in seeds)
        if found is not best and difference and difference.runs > 1:
            shown = f"{difference.mean:+.3f} ± {difference.deviation:.3f}"
            texts = (shown, str(difference.runs), _seeds_needed(difference))
            rows.append([name_cell(group), *(TableCell(text=text) for text in texts)])
    if not rows:
        return None
    return Table(
        title=f"difference to {finished[means.index(max(means))].label}, seed by seed",
        headings=["configuration", score.title, "seeds", "seeds to tell them apart"],
        rows=rows,
        notes=[
            "mean and deviation of the differences; of so many seeds a paired t-test at 5 % finds one 4 times in 5",
            *less_is_better([score]),
        ],
    )


def _by_seed(group: Group, metric: str) -> Mapping[int | None, float]:
    found = {run.seed: final(run, metric) for run in group.counted}
    return {seed: value for seed, value in found.items() if math.isfinite(value)}


def _seeds_needed(difference: Stat) -> str:
    """Pairs for a paired t-test: those of a normal deviate, and what its few degrees of freedom take beside.

    Guenther, Sample size formulas for normal theory t tests, The American Statistician 35 (1981).
    """
    ratio = difference.deviation / abs(difference.mean) if difference.mean else math.inf
    needed = (SIGNIFICANT + POWERFUL) ** 2 * ratio**2 + SIGNIFICANT**2 / 2
    return str(max(FEWEST_SEEDS, math.ceil(needed))) if needed <= MOST_SEEDS else f"more than {MOST_SEEDS}"
