"""Shamir's secret sharing: a number becomes m shares, any t of which give it back, and fewer tell nothing of it.

How to Share a Secret. Shamir. Communications of the ACM 22(11), 1979. Share x is the value at x of a polynomial of
degree t - 1 whose value at 0 is the secret and whose other coefficients are random, among the integers modulo a prime.
"""

import secrets
from collections.abc import Sequence
from math import prod

PRIME = 2**256 + 297
"""The least that is larger than any secret of 32 bytes."""


def split(secret: int, num_shares: int, threshold: int) -> list[int]:
    """Shares 1 to m of a secret, of which it takes t to know it."""
    coefficients = [*(secrets.randbelow(PRIME) for _ in range(threshold - 1)), secret]
    return [value_at(x, coefficients) for x in range(1, num_shares + 1)]


def value_at(x: int, coefficients: Sequence[int]) -> int:
    """A polynomial's value, from its coefficients by falling degree."""
    value = 0
    for coefficient in coefficients:
        value = (value * x + coefficient) % PRIME
    return value


def weights(places: Sequence[int]) -> list[int]:
    """What the shares at these places x, as many as it takes, count in the secret (Lagrange's polynomials at 0)."""
    return [
        prod(other for other in places if other != x)
        * pow(prod(other - x for other in places if other != x), -1, PRIME)
        % PRIME
        for x in places
    ]


def join(shares: Sequence[int], weights: Sequence[int]) -> int:
    """The secret of these shares."""
    return sum(share * weight for share, weight in zip(shares, weights, strict=True)) % PRIME
