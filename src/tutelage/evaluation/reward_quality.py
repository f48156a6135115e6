"""How well a reward tells right answers from wrong ones, beside two rewards that cost nothing: own log-prob and length.

Pure functions of numbers: several scored answers per prompt go in, a record comes out. Everything is compared within
a prompt, where rewards are meaningful.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from math import comb

import numpy as np

from tutelage.evaluation.statistics import bounded_interval, mean_interval
from tutelage.results import BestOfRecord, RewardQualityRecord

__all__ = ["ScoredAnswers", "auc", "best_of", "reward_quality", "within_prompt_correlation"]


@dataclass(frozen=True, slots=True)
class ScoredAnswers:
    """The answers to one prompt, one number each.

    Attributes:
        rewards: of the reward in question, in its unit.
        logps: the policy's own log-prob (nats per sequence).
        lengths: tokens.
        scores: the verifier's; 1 or more is right.
    """

    rewards: Sequence[float]
    logps: Sequence[float]
    lengths: Sequence[float]
    scores: Sequence[float]


def auc(values: Sequence[float], scores: Sequence[float]) -> float | None:
    """How often a right answer has a larger value than a wrong one, over all such pairs; a tie counts half.

    It is the area under the ROC curve of the values. None where all are right or all are wrong.

    >>> auc([3.0, 1.0, 1.0], [1, 0, 1])
    0.75
    """
    right = np.asarray([value for value, score in zip(values, scores, strict=True) if score >= 1])
    wrong = np.asarray([value for value, score in zip(values, scores, strict=True) if score < 1])
    if not len(right) or not len(wrong):
        return None
    return float(np.mean((np.sign(right[:, None] - wrong[None, :]) + 1) / 2))


def best_of(n: int, values: Sequence[float], scores: Sequence[float]) -> float:
    """The expected score of the answer with the largest value among ``n`` answers drawn without replacement.

    Exact: the mean over all subsets of ``n``, where answers of the same value are picked equally often.

    Raises:
        ValueError: fewer than ``n`` answers, or ``n`` below 1.

    >>> best_of(1, [3.0, 1.0, 2.0], [1, 0, 0]) == 1 / 3, best_of(2, [3.0, 1.0, 2.0], [1, 0, 0]) == 2 / 3
    (True, True)
    """
    if not 1 <= n <= len(values):
        raise ValueError(f"there is no subset of {n} among {len(values)}")
    ordered = sorted(zip(values, scores, strict=True), key=lambda pair: pair[0])
    expected, below = 0.0, 0
    for _, tied in groupby(ordered, key=lambda pair: pair[0]):
        tied_scores = [score for _, score in tied]
        upto = below + len(tied_scores)
        share = (comb(upto, n) - comb(below, n)) / comb(len(values), n)
        expected += share * float(np.mean(tied_scores))
        below = upto
    return expected


def within_prompt_correlation(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> float | None:
    """Pearson correlation over all answers after the mean of each prompt is taken off; None where one side is constant.

    Args:
        a, b: one list per prompt, one number per answer.
    """
    first, second = (np.concatenate([np.asarray(row) - np.mean(row) for row in rows]) for rows in (a, b))
    # The mean of equal numbers may be off by a rounding, which is no variation.
    if any(
        np.abs(part).max() <= 1e-9 * max(1.0, *(abs(value) for row in rows for value in row))
        for part, rows in ((first, a), (second, b))
    ):
        return None
    return float(np.clip(first @ second / np.sqrt((first @ first) * (second @ second)), -1.0, 1.0))


def reward_quality(prompts: Sequence[ScoredAnswers]) -> RewardQualityRecord | None:
    """What several scored answers per prompt say of a reward.

    Args:
        prompts: with equally many answers each.

    Returns:
        None where there is nothing to compare (fewer than two answers per prompt), or a number is NaN or infinite.
    """
    count = min((len(prompt.scores) for prompt in prompts), default=0)
    ways = {
        "reward": [prompt.rewards for prompt in prompts],
        "logp": [prompt.logps for prompt in prompts],
        "length": [prompt.lengths for prompt in prompts],
    }
    scores = [prompt.scores for prompt in prompts]
    if count < 2 or not all(np.isfinite(row).all() for rows in (*ways.values(), scores) for row in rows):
        return None
    areas = {
        name: [area for row, told in zip(rows, scores, strict=True) if (area := auc(row, told)) is not None]
        for name, rows in ways.items()
    }
    correlations = {
        name: found
        for name in ("logp", "length")
        if (found := within_prompt_correlation(ways["reward"], ways[name])) is not None
    }
    return RewardQualityRecord(
        prompts=len(prompts),
        answers=count,
        auc={name: bounded_interval(found) for name, found in areas.items() if found},
        best_of=[_best_of_record(n, ways["reward"], ways["logp"], scores) for n in _sizes(count)],
        correlations=correlations,
    )


def _sizes(count: int) -> list[int]:
    """1, 2, 4, … up to the number of answers."""
    return [2**power for power in range(count.bit_length()) if 2**power <= count]


def _best_of_record(
    n: int, rewards: Sequence[Sequence[float]], logps: Sequence[Sequence[float]], scores: Sequence[Sequence[float]]
) -> BestOfRecord:
    picked = {
        name: mean_interval([best_of(n, row, told) for row, told in zip(rows, scores, strict=True)])
        for name, rows in (("reward", rewards), ("logp", logps), ("oracle", scores))
    }
    return BestOfRecord(n=n, mean=mean_interval([float(np.mean(told)) for told in scores]), **picked)
