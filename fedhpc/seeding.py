"""Randomness as a function of (run seed, round, device, purpose), never of call order.

Every random draw of a run takes its generator from here, so that the same draw gives the same numbers on any rank, in
any order, before or after an interruption.
"""

import hashlib

import numpy as np

EVERY_DEVICE = -1
BEFORE_ROUNDS = -1


def derive_seed(seed: int, *, purpose: str, round_index: int = BEFORE_ROUNDS, device: int = EVERY_DEVICE) -> int:
    """A 63-bit seed for one purpose of one device in one round."""
    key = f"{seed}/{round_index}/{device}/{purpose}".encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "little") >> 1


def generator(
    seed: int, *, purpose: str, round_index: int = BEFORE_ROUNDS, device: int = EVERY_DEVICE
) -> np.random.Generator:
    """A NumPy generator for one purpose of one device in one round."""
    return np.random.Generator(
        np.random.PCG64(derive_seed(seed, purpose=purpose, round_index=round_index, device=device))
    )
