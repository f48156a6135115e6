"""Win rates, raw and at equal length."""

import numpy as np
import pytest
from scipy.optimize import minimize

from tutelage.evaluation.win_rate import win_rate


def test_raw_counts_all_pairs_of_a_row_and_ties_half():
    found = win_rate([[1.0, 0.0], [2.0]], [[0.5], [2.0]], [3.0, 3.0], [3.0, 3.0])
    assert (found.raw.mean, found.raw.n) == (0.5, 2)
    assert found.controlled is None  # no length varies


def planted(intercept, coefficient, rows=4000, seed=0):
    """Rows whose wins follow the model, with the others' lengths 20 and deviation near 10."""
    rng = np.random.default_rng(seed)
    longer = rng.normal(5, 10, rows).round()
    logits = intercept + coefficient * np.tanh(longer / longer.std())
    wins = rng.random(rows) < 1 / (1 + np.exp(-logits))
    return [[float(won)] for won in wins], [[0.5]] * rows, 20 + longer, np.full(rows, 20.0)


def test_length_is_told_apart_from_quality():
    """Answers that win by their length alone win half at equal length, and the planted coefficients come back."""
    found = win_rate(*planted(0.0, 2.0))
    assert found.raw.low > 0.55
    assert found.controlled.rate.low < 0.5 < found.controlled.rate.high
    assert found.controlled.coefficient == pytest.approx(2.0, abs=0.2)
    better = win_rate(*planted(1.0, -1.0)).controlled
    assert better.intercept == pytest.approx(1.0, abs=0.15)
    assert better.rate.low < 1 / (1 + np.exp(-1.0)) < better.rate.high


def test_interval_covers():
    """The planted rate lies in about 95 of 100 intervals."""
    found = [win_rate(*planted(0.5, 1.0, rows=200, seed=seed)).controlled.rate for seed in range(100)]
    truth = 1 / (1 + np.exp(-0.5))
    assert 88 <= sum(rate.low < truth < rate.high for rate in found) <= 100


def test_fit_is_the_maximum_of_the_likelihood():
    """Of partly won rows too, held against a general optimizer."""
    rng = np.random.default_rng(1)
    rewards, others = rng.normal(size=(60, 3)), rng.normal(size=(60, 2))
    lengths, other_lengths = rng.integers(5, 30, 60), rng.integers(5, 30, 60)
    model = win_rate(rewards.tolist(), others.tolist(), lengths, other_lengths).controlled
    wins = np.array([(a[:, None] > b).mean() for a, b in zip(rewards, others, strict=True)])
    x = np.tanh((lengths - other_lengths) / model.deviation)

    def loss(parameters):
        logits = parameters[0] + parameters[1] * x
        return (np.logaddexp(0, logits) - wins * logits).sum() + parameters[1] ** 2 / 200

    expected = minimize(loss, np.zeros(2)).x
    assert (model.intercept, model.coefficient) == (
        pytest.approx(expected[0], abs=1e-3),
        pytest.approx(expected[1], abs=1e-3),
    )


def test_a_side_that_wins_everything_has_no_model():
    assert win_rate([[1.0], [1.0]], [[0.0], [0.0]], [1.0, 2.0], [2.0, 1.0]).controlled is None
