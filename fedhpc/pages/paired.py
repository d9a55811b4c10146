"""How far configurations are apart, seed by seed."""

import math
from collections.abc import Mapping, Sequence

from fedhpc.pages.groups import Group, Stat, final, stat
from fedhpc.pages.tables import Cell, Table, name_cell

POWER = (1.96 + 0.84) ** 2
"""Runs a side = POWER (deviation / difference)^2 find a difference 80 % of the time by a test at 5 %, two-sided; the
normal approximation."""
MOST_SEEDS = 100
"""More would not be run."""


def paired_table(groups: Sequence[Group], metric: str, words: str) -> Table | None:
    """Each configuration's difference to the best; None where no two have two seeds in common.

    Runs of one seed share partition, sampled devices and batches, so their difference varies less than they do.
    """
    finished = [group for group in groups if group.is_finished]
    values = [_by_seed(group, metric) for group in finished]
    means = [sum(found.values()) / len(found) if found else -math.inf for found in values]
    rows = []
    for group, found in zip(finished, values, strict=True):
        best = values[means.index(max(means))]
        seeds = found.keys() & best.keys()
        difference = stat(found[seed] - best[seed] for seed in seeds)
        if found is not best and difference and difference.runs > 1:
            shown = f"{difference.mean:+.3f} ± {difference.deviation:.3f}"
            texts = (shown, str(difference.runs), _seeds_needed(difference))
            rows.append([name_cell(group), *(Cell(text=text) for text in texts)])
    if not rows:
        return None
    return Table(
        title=f"difference to {finished[means.index(max(means))].label}, seed by seed",
        headings=["configuration", words, "seeds", "seeds to tell them apart"],
        rows=rows,
        notes=["mean and deviation of the differences; with so many seeds a test at 5 % finds such a one 4 times in 5"],
    )


def _by_seed(group: Group, metric: str) -> Mapping[int | None, float]:
    found = {run.seed: final(run, metric) for run in group.counted}
    return {seed: value for seed, value in found.items() if math.isfinite(value)}


def _seeds_needed(difference: Stat) -> str:
    ratio = difference.deviation / abs(difference.mean) if difference.mean else math.inf
    needed = POWER * ratio**2
    return str(max(2, math.ceil(needed - 1e-9))) if needed <= MOST_SEEDS else f"more than {MOST_SEEDS}"
