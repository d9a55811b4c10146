"""What the server does about bad uploads and runs that diverge."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fedhpc.config import Config
from fedhpc.federation.schedule import learning_rate
from fedhpc.job.log import log
from fedhpc.methods import Method
from fedhpc.methods.updates import Fault, Vector, longest_change

ADVICE = "Try a smaller device.learning_rate or server.learning_rate, in another run_dir"
GROWTH_FACTOR = 2.0
GROWTH_ROUNDS = 3
"""Update norms so many times that of round 0, and what momentum adds to it, so many rounds on end are growth without
bound. Measured with MiniLM on TREC: `paper` at a device learning rate of 5e-3 passes 3, runs that learn stay below
1."""


def sift(
    config: Config, round_index: int, start: Vector, headers: np.ndarray
) -> tuple[list[int], list[dict[str, Any]]]:
    """The rows of the uploads to use; the others' devices, with the reason.

    Args:
        start: P^t, from which the uploads were made.
        headers: [m], of all uploads of the round, with what the devices' ranks found fault with.

    Raises:
        FloatingPointError: more than `server.max_rejected` of them are bad.
    """
    kept, rejected = [], []
    for row, header in enumerate(headers):
        if header["fault"] == Fault.NONE:
            kept.append(row)
            continue
        device, norm = int(header["device"]), float(header["norm"])
        reason = _reason(config, round_index, start, header)
        log.warning("round %d: upload of %s rejected: %s", round_index, _device(config, device), reason)
        rejected.append({"device": device, "norm": norm if np.isfinite(norm) else None, "reason": reason})
    if len(rejected) > config.server.max_rejected * len(headers) + 1e-9:
        raise FloatingPointError(
            f"round {round_index}: {len(rejected)} of {len(headers)} uploads are bad, more than server.max_rejected: "
            f"{config.server.max_rejected} allows; the last checkpoint is intact. Bad: "
            + "; ".join(f"{_device(config, bad['device'])}: {bad['reason']}" for bad in rejected[:5])
            + f". {ADVICE}"
        )
    return kept, rejected


def _device(config: Config, device: object) -> str:
    """Under `privacy`, nobody is told who takes part."""
    return "a device" if config.privacy.is_on else f"device {device}"


def _reason(config: Config, round_index: int, start: Vector, header: np.ndarray) -> str:
    if header["fault"] != Fault.TOO_LARGE:
        return {Fault.NAN: "NaN", Fault.INFINITE: "infinite"}[Fault(int(header["fault"]))]
    steps = int(header["num_steps"])
    limit = longest_change(start, num_steps=steps, learning_rate=learning_rate(config, round_index))
    return f"larger than {steps} steps can be ({limit:.3g})"


def check_finite(update_norm: float, round_index: int) -> None:
    """See that a server step left numbers.

    Raises:
        FloatingPointError: it did not.
    """
    if not np.isfinite(update_norm):
        raise FloatingPointError(
            f"the global parameters are no longer finite after round {round_index}; the last checkpoint is intact. "
            + ADVICE
        )


def warn_of_growth(norms: Sequence[float], method: Method) -> None:
    """Say once that the updates grow without bound.

    Args:
        norms: the update norm of every round so far.
    method: knows how many times that of round 0 the update norm becomes by its momentum alone.
    """
    above = [norm > GROWTH_FACTOR * method.usual_growth * norms[0] for norm in norms]
    grown = [all(above[t : t + GROWTH_ROUNDS]) for t in range(len(norms) - GROWTH_ROUNDS + 1)]
    if not grown or not grown[-1] or any(grown[:-1]):
        return
    log.warning(
        "the update norm grows without bound: %.3g now, %.3g in round 0; the run is likely to diverge. Lower "
        "server.learning_rate%s",
        norms[-1],
        norms[0],
        method.if_it_diverges,
    )
