"""`selection.ratio: auto`: the devices' lossless ratios as one, and in words."""

import numpy as np
from numpy.typing import NDArray

from fedhpc.selection.strategy import global_scores


def global_ratio(ratios: NDArray[np.float64], num_examples: NDArray[np.int64], by: str) -> float:
    """The devices' lossless ratios as one: `eigengap` weighs them by their examples, `density` (released) does not."""
    weights = num_examples if by == "eigengap" else np.ones_like(num_examples)
    return float(global_scores(ratios[:, None], weights)[0])


def describe_ratio(by: str, record: np.void) -> str:
    """What a device has found, in words."""
    if by == "density":
        why = f"mass above 0 {record['mass']:.3f}"
    else:
        width = "" if record["gap"] > 4 * record["lipschitz"] else ", the widest, is not"
        why = f"gap {record['gap']:.3g}{width} above 4 Lip = {4 * record['lipschitz']:.3g}"
    return f"device {record['device']}: {record['ratio']:.3f} ({why})"


def describe_spread(by: str, ratios: NDArray[np.float64]) -> str:
    """What all devices have found, in words."""
    spread = f"{ratios.min():.3f} to {ratios.max():.3f}, standard deviation {ratios.std():.3f}"
    return f"{by}; {spread} over {len(ratios)} devices"
