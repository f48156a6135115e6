"""How often one set of answers has more reward than another, raw and at equal length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from tutelage.evaluation.statistics import Interval, mean_interval

__all__ = ["LengthControlled", "WinRate", "win_rate"]

_STRENGTH = (
    100.0  # inverse strength of the L2 penalty on the length's coefficient: it matters where length alone decides
)
_QUANTILE = 1.96  # of the normal distribution, for 95%


@dataclass(frozen=True, slots=True)
class LengthControlled:
    """The win rate that a logistic model gives for answers of equal length.

    P(win) = σ(intercept + coefficient · tanh((length − other length) / deviation)), as in Dubois et al. 2024 (arXiv
    2404.04475), without their term for each prompt's difficulty, which needs the answers of many models.

    Attributes:
        rate: σ(intercept). The interval is the intercept's, with the sandwich estimate of its variance, because a row that is
            won in part is no coin toss.
        intercept, coefficient: of the model, in logits.
        deviation: standard deviation of the differences in length, tokens.
    """

    rate: Interval
    intercept: float
    coefficient: float
    deviation: float


@dataclass(frozen=True, slots=True)
class WinRate:
    """Attributes:
    raw: share of comparisons with the larger reward; a tie counts half.
    controlled: None where it cannot be told: one side wins every row, or all rows differ equally in length.
    """

    raw: Interval
    controlled: LengthControlled | None


def win_rate(
    rewards: Sequence[Sequence[float]],
    other_rewards: Sequence[Sequence[float]],
    lengths: Sequence[float],
    other_lengths: Sequence[float],
) -> WinRate:
    """Of answers against others to the same prompts.

    Args:
        rewards, other_rewards: of each row the rewards of its answers; all are compared with all of the row.
        lengths, other_lengths: of each row the mean length of its answers, in tokens.
    """
    wins = np.array([_won(*row) for row in zip(rewards, other_rewards, strict=True)])
    longer = np.asarray(lengths, dtype=float) - np.asarray(other_lengths, dtype=float)
    return WinRate(mean_interval(wins), _controlled(wins, longer))


def _won(rewards: Sequence[float], others: Sequence[float]) -> float:
    difference = np.subtract.outer(rewards, others)
    return float(np.mean((difference > 0) + (difference == 0) / 2))


def _controlled(wins: np.ndarray, longer: np.ndarray) -> LengthControlled | None:
    deviation = float(longer.std())
    if deviation == 0 or not 0 < wins.mean() < 1:
        return None
    lengths = np.tanh(longer / deviation)
    intercept, coefficient = _fit(wins, lengths)
    design = np.stack([np.ones_like(lengths), lengths], axis=1)
    expected = expit(intercept + coefficient * lengths)
    curvature = (design * (expected * (1 - expected))[:, None]).T @ design + np.diag([0, 1 / _STRENGTH])
    scores = design * (wins - expected)[:, None]
    inverse = np.linalg.inv(curvature)
    half = _QUANTILE * float(np.sqrt((inverse @ (scores.T @ scores) @ inverse)[0, 0]))
    rate, low, high = (float(expit(intercept + step)) for step in (0.0, -half, half))
    return LengthControlled(Interval(rate, low, high, len(wins)), intercept, coefficient, deviation)


def _fit(wins: np.ndarray, lengths: np.ndarray) -> tuple[float, float]:
    """Intercept and coefficient; a row that is won in part counts as a win and a loss with these weights."""
    outcomes = np.repeat([1, 0], len(wins))
    weights = np.concatenate([wins, 1 - wins])
    kept = weights > 0
    model = LogisticRegression(C=_STRENGTH).fit(np.tile(lengths, 2)[kept, None], outcomes[kept], weights[kept])
    return float(model.intercept_[0]), float(model.coef_[0, 0])
