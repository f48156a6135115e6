"""Means with intervals, and differences of two runs on the same rows.

Which interval is used is decided here and nowhere else: `mean_interval` and `paired_difference` take formulas for
0/1 scores and the bootstrap for everything else. A bootstrap only knows the variation in its data: for eight right
answers out of eight it would give an accuracy of exactly 1.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

from tutelage.errors import UserError
from tutelage.results import Interval

__all__ = [
    "Interval",
    "bootstrap_mean",
    "bounded_interval",
    "mean_interval",
    "paired_difference",
    "proportion_interval",
]

_DRAWS_AT_ONCE = 2**20  # bounds the memory of a bootstrap to a few times 8 MiB, however many rows there are


def mean_interval(values: ArrayLike, *, seed: int = 0, confidence: float = 0.95) -> Interval:
    """Mean of ``values`` [n], one per row: the Wilson interval if all are 0 or 1, the bootstrap otherwise.

    Raises:
        UserError: no values, or one is NaN or infinite.

    >>> interval = mean_interval([1, 1, 1, 1, 1, 1, 1, 1])
    >>> round(interval.low, 3), interval.high
    (0.676, 1.0)
    """
    if _is_binary(_checked(values)):
        return proportion_interval(values, confidence=confidence)
    return bootstrap_mean(values, seed=seed, confidence=confidence)


def bootstrap_mean(values: ArrayLike, *, seed: int = 0, resamples: int = 2000, confidence: float = 0.95) -> Interval:
    """Percentile bootstrap of the mean of ``values`` [n], one per row.

    Draws n rows with replacement, ``resamples`` times, takes the mean of each draw and cuts off both tails. The same
    arguments give the same interval. Values that are all equal give an interval of width zero: the bootstrap knows no
    spread but that of the rows, so such an interval supports no claim.

    Raises:
        UserError: no values, or one is NaN or infinite.
    """
    array = _checked(values)
    n, rng = len(array), np.random.default_rng(seed)
    block = max(1, _DRAWS_AT_ONCE // n)
    means = np.concatenate(
        [
            array[rng.integers(n, size=(min(block, resamples - start), n))].mean(axis=1)
            for start in range(0, resamples, block)
        ]
    )
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(array.mean()), float(low), float(high), n)


def proportion_interval(values: ArrayLike, *, confidence: float = 0.95) -> Interval:
    """Wilson's score interval (1927) for ``values`` [n] of 0 and 1.

    Raises:
        UserError: no values, or one is neither 0 nor 1.
    """
    array = _checked(values)
    if not _is_binary(array):
        raise UserError("a proportion needs values that are 0 or 1.", remedy="Use bootstrap_mean for other scores.")
    return _wilson(len(array), float(array.mean()), confidence)


def _wilson(n: int, p: float, confidence: float) -> Interval:
    z = _z(confidence)
    center = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    # At p = 0 and p = 1 the bound is exactly 0 and 1; rounding must not put it beyond.
    return Interval(p, max(0.0, center - half) if p > 0 else 0.0, min(1.0, center + half) if p < 1 else 1.0, n)


def bounded_interval(values: ArrayLike, *, confidence: float = 0.95) -> Interval:
    """Mean of ``values`` [n] in [0, 1] with Wilson's interval, which is too wide for them rather than too narrow.

    No distribution on [0, 1] varies more than that of zeros and ones with the same mean. The bootstrap would be
    overconfident for a handful of rows that happen to be alike.

    >>> bounded_interval([0.75, 0.75, 1.0]).low < 0.5
    True
    """
    array = _checked(values)
    return _wilson(len(array), float(array.mean()), confidence)


def paired_difference(
    a: ArrayLike, b: ArrayLike, *, seed: int = 0, resamples: int = 2000, confidence: float = 0.95
) -> Interval:
    """Mean of a − b over the same rows, ``a[i]`` and ``b[i]`` being the two runs' values of one row.

    If all values are 0 or 1, the interval is that of Bonett and Price (2012) for paired proportions, which counts one
    more row won and one more lost before it takes the usual normal interval, so that two runs that agree on every
    row do not get an interval of width zero. Otherwise it is the bootstrap over rows, whose interval has width zero where
    all rows differ by the same amount.

    Raises:
        UserError: a and b differ in length or are empty, or a value is NaN or infinite.
    """
    first, second = _checked(a), _checked(b)
    if len(first) != len(second):
        raise UserError(
            f"a paired difference needs one value per row from both: got {len(first)} and {len(second)}.",
            remedy="Keep only the rows that both have, in the same order.",
        )
    difference = first - second
    if not (_is_binary(first) and _is_binary(second)):
        return bootstrap_mean(difference, seed=seed, resamples=resamples, confidence=confidence)
    n = len(difference)
    won, lost = ((difference > 0).sum() + 1) / (n + 2), ((difference < 0).sum() + 1) / (n + 2)
    half = _z(confidence) * math.sqrt((won + lost - (won - lost) ** 2) / (n + 2))
    low, high = max(-1.0, won - lost - half), min(1.0, won - lost + half)
    return Interval(float(difference.mean()), float(low), float(high), n)


def _checked(values: ArrayLike) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not len(array):
        raise UserError(f"an interval needs a list of at least one value, got shape {array.shape}.")
    if not np.isfinite(array).all():
        raise UserError(
            "a value is NaN or infinite.",
            row=int(np.flatnonzero(~np.isfinite(array))[0]) + 1,
            remedy="Look at the row that it comes from; leaving it out would change what is compared.",
        )
    return array


def _is_binary(array: np.ndarray) -> bool:
    return bool(np.isin(array, (0.0, 1.0)).all())


def _z(confidence: float) -> float:
    return NormalDist().inv_cdf((1 + confidence) / 2)
