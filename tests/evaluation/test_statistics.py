"""Intervals, against arithmetic that can be redone by hand and against their own promise: the coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tutelage.errors import UserError
from tutelage.evaluation.statistics import (
    Interval,
    bootstrap_mean,
    mean_interval,
    paired_difference,
    proportion_interval,
)


def test_wilson_by_hand():
    # n = 10, p = 0.2, z = 1.959964: z² = 3.841459.
    # center = (0.2 + 3.841459 / 20) / (1 + 0.3841459) = 0.3920730 / 1.3841459 = 0.2832599
    # half   = 1.959964 / 1.3841459 * sqrt(0.016 + 3.841459 / 400) = 1.4160097 * 0.1600114 = 0.2265777
    interval = proportion_interval([1, 1] + [0] * 8)
    assert interval.mean == pytest.approx(0.2)
    assert interval.low == pytest.approx(0.0566822, abs=2e-6)
    assert interval.high == pytest.approx(0.5098376, abs=2e-6)
    assert interval.n == 10


def test_wilson_of_equal_scores_has_width():
    # p = 1: the lower bound is 1 / (1 + z² / n).
    assert proportion_interval([1] * 20) == Interval(1.0, pytest.approx(1 / (1 + 1.959964**2 / 20)), 1.0, 20)
    assert proportion_interval([0] * 20).low == 0.0
    assert proportion_interval([0] * 20).high == pytest.approx(1 - 1 / (1 + 1.959964**2 / 20))
    assert bootstrap_mean([1] * 20).low == 1.0  # what it would say otherwise


@pytest.mark.parametrize("p", [0.05, 0.3, 0.9])
def test_wilson_covers(p):
    n = 40
    weights = [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]
    covered = [
        weight
        for k, weight in enumerate(weights)
        if (interval := proportion_interval([1] * k + [0] * (n - k))).low <= p <= interval.high
    ]
    assert 0.92 < sum(covered) < 0.99


def test_bootstrap_covers():
    rng = np.random.default_rng(1)
    intervals = [bootstrap_mean(rng.exponential(size=60), seed=trial, resamples=400) for trial in range(400)]
    covered = np.mean([interval.low <= 1.0 <= interval.high for interval in intervals])
    assert 0.89 < covered < 0.97  # a little under 0.95 for a skewed distribution of 60 rows


def test_bootstrap_has_the_width_of_the_normal_interval():
    values = np.random.default_rng(0).normal(3.0, 2.0, size=400)
    interval = bootstrap_mean(values)
    half = 1.96 * values.std() / math.sqrt(400)
    assert interval.mean == pytest.approx(values.mean())
    assert interval.high - interval.low == pytest.approx(2 * half, rel=0.08)
    wider = bootstrap_mean(values, confidence=0.99)
    assert wider.low < interval.low
    assert wider.high > interval.high


def test_bootstrap_is_deterministic_and_blocks_do_not_matter(monkeypatch):
    values = np.random.default_rng(0).normal(size=50)
    assert bootstrap_mean(values, seed=3) == bootstrap_mean(values, seed=3)
    assert bootstrap_mean(values, seed=3) != bootstrap_mean(values, seed=4)
    whole = bootstrap_mean(values, seed=3)
    monkeypatch.setattr("tutelage.evaluation.statistics._DRAWS_AT_ONCE", 50 * 7)
    assert bootstrap_mean(values, seed=3) == whole


def test_mean_interval_picks():
    assert mean_interval([0, 1, 1]) == proportion_interval([0, 1, 1])
    assert mean_interval([0, 0.5, 1], seed=2) == bootstrap_mean([0, 0.5, 1], seed=2)


def test_paired_difference_uses_the_pairing():
    rng = np.random.default_rng(0)
    b = rng.normal(-50.0, 20.0, size=100)
    a = b + rng.normal(1.0, 0.5, size=100)
    interval = paired_difference(a, b)
    assert 0.85 < interval.low < interval.mean < interval.high < 1.15
    unpaired = paired_difference(a, rng.permutation(b))
    assert unpaired.low < 0 < unpaired.high


def test_paired_scores_by_hand():
    # 8 rows: 3 won, 1 lost. won = 4 / 10, lost = 2 / 10; half = 1.959964 * sqrt((0.6 - 0.04) / 10) = 0.4638121
    a, b = [1, 1, 1, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1, 0, 0]
    interval = paired_difference(a, b)
    assert interval.mean == 0.25
    assert interval.low == pytest.approx(0.2 - 0.4638121, abs=1e-6)
    assert interval.high == pytest.approx(0.2 + 0.4638121, abs=1e-6)


def test_paired_scores_that_agree_have_width():
    interval = paired_difference([0, 1] * 50, [0, 1] * 50)
    assert interval.mean == 0
    assert interval.low == pytest.approx(-interval.high)
    assert 0.02 < interval.high < 0.04


def test_paired_scores_cover():
    # Won with probability 0.10, lost with 0.05, over 80 rows: the true difference is 0.05.
    rng = np.random.default_rng(0)
    draws = rng.choice(3, p=[0.10, 0.05, 0.85], size=(1000, 80))
    covered = 0
    for row in draws:
        interval = paired_difference((row == 0).astype(int), (row == 1).astype(int))
        covered += interval.low <= 0.05 <= interval.high
    assert 0.93 < covered / 1000 < 0.98


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap_mean([]), "at least one value"),
        (lambda: mean_interval([0.0, float("nan")]), "row 2"),
        (lambda: proportion_interval([0.5]), "0 or 1"),
        (lambda: paired_difference([1.0, 2.0], [1.0]), "got 2 and 1"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_to_dict_round_trip():
    interval = bootstrap_mean([1.0, 2.0, 4.0])
    assert interval.to_dict() == {"mean": interval.mean, "low": interval.low, "high": interval.high, "n": 3}
