"""The device's side: no change is longer than C."""

import math

import numpy as np

from fedhpc.methods.updates import BLOCK, Vector, distance

CLIP_RATE = 0.2
"""eta_C."""


def term(vector: Vector, origin: Vector, clip: float, *, with_flag: bool) -> Vector:
    """What a device adds to the sums: its vector [n] clipped, and with a flag behind it [n + 1] whether it was short.

    Args:
        vector: as the server method would have it.
        origin: from where its change is measured [n].
        clip: C.
    """
    length = distance(vector, origin)
    short = length <= clip  # not so of NaN
    found = vector if short else shortened(vector, origin, clip / length)
    return np.append(found, np.float32(short)) if with_flag else found


def shortened(vector: Vector, origin: Vector, scale: float) -> Vector:
    """The point [n] that is this share of the way from the origin to the vector; the origin where it is no number.

    It is never further: where rounding to float32 would lengthen an element's change, it is rounded the other way.
    """
    if not scale > 0:  # of a way that is infinite, or no number
        return origin.copy()
    found = np.empty_like(vector)
    for first in range(0, vector.size, BLOCK):
        block = slice(first, first + BLOCK)
        start = origin[block].astype(np.float64)
        wanted = scale * (vector[block] - start)
        near = (start + wanted).astype(np.float32)
        too_far = np.abs(near - start) > np.abs(wanted)
        near[too_far] = np.nextafter(near[too_far], origin[block][too_far])
        found[block] = near
    return found


def next_clip(clip: float, share: float, quantile: float) -> float:
    """C of the next round: shorter where more than the quantile were short, longer where fewer.

    Differentially Private Learning with Adaptive Clipping. Andrew, Thakkar, McMahan, Ramaswamy. NeurIPS 2021.
    https://arxiv.org/abs/1905.03871, section 2.2, geometric updates.

    Args:
        clip: C of this round.
        share: of the devices whose change was no longer than it, with noise; what is beyond 0 and 1 is noise alone.
    """
    return clip * math.exp(-CLIP_RATE * (min(max(share, 0.0), 1.0) - quantile))
