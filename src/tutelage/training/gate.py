"""Whether a reward deserves to move the policy: it must beat chance, and what costs nothing to compute."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tutelage.evaluation.statistics import Interval, bounded_interval
from tutelage.groups import Completion, Group
from tutelage.rewards.comparisons import TruncatedSamples, contrast

__all__ = [
    "Gate",
    "Yardsticks",
    "copied_share",
    "cross_validated",
    "obstacle",
    "own_logp",
    "pair_accuracy",
    "yardsticks",
]

Gate = Literal["yardsticks", "chance", "off"]


def pair_accuracy(
    groups: Sequence[Group], value: Callable[[Completion], float], truncated_samples: TruncatedSamples
) -> Interval | None:
    """How often a demonstration is over a sample of its prompt by some value, a row counting once; a tie counts half.

    None where nothing can be compared.

    >>> from tutelage.groups import Role
    >>> def answer(role, length):
    ...     return Completion((1,) * length, role, finished=True)
    >>> rows = [Group((1,), (answer(Role.DEMONSTRATION, 3), answer(Role.SAMPLE, 1), answer(Role.SAMPLE, 5)))]
    >>> pair_accuracy(rows, lambda completion: len(completion.token_ids), "score").mean
    0.5
    """
    rows = []
    for group in groups:
        gaps = [
            value(part.completions[better]) - value(part.completions[worse])
            for part in contrast(group, truncated_samples)
            for better, worse in part.pairs
        ]
        if gaps:
            rows.append(float(np.mean((np.sign(gaps) + 1) / 2)))
    return bounded_interval(rows) if rows else None


def own_logp(completion: Completion) -> float:
    """The log-prob of a completion under the policy that drew the samples (nats per sequence)."""
    return completion.sum("old_logps")


@dataclass(frozen=True, slots=True)
class Yardsticks:
    """What a reward is held against: how well the policy's own log-prob and the length rank the same pairs.

    Attributes:
        logp: accuracy of the policy's own log-prob. It is below one half where an over-confident policy finds its own
            samples likelier than demonstrations that it has not seen.
        length: accuracy of the length or of its opposite, whichever is better.
    """

    logp: float
    length: float


def yardsticks(groups: Sequence[Group], truncated_samples: TruncatedSamples) -> Yardsticks | None:
    """The yardsticks on validation groups whose completions know their ``old_logps``; None where nothing is to compare."""
    logp = pair_accuracy(groups, own_logp, truncated_samples)
    length = pair_accuracy(groups, lambda completion: len(completion.token_ids), truncated_samples)
    if logp is None or length is None:
        return None
    return Yardsticks(logp.mean, max(length.mean, 1 - length.mean))


def copied_share(groups: Sequence[Group]) -> float:
    """Share of the samples of demonstrated prompts that equal the demonstration; 0 where there are none."""
    copies = [
        sample.token_ids in {demonstration.token_ids for demonstration in group.demonstrations}
        for group in groups
        if group.demonstrations
        for sample in group.samples
    ]
    return float(np.mean(copies)) if copies else 0.0


def cross_validated(facts: Mapping[str, float]) -> Interval | None:
    """How a reward ranks out-of-fold samples of prompts that its fit did not see; None where that was not found.

    The interval is the widest that so many prompts can have.

    Args:
        facts: of the fit.
    """
    if "accuracy/out_of_fold" not in facts:
        return None
    mean, prompts = facts["accuracy/out_of_fold"], int(facts["prompts"])
    half = 0.98 / prompts**0.5
    return Interval(mean, mean - half, mean + half, prompts)


def obstacle(
    gate: Gate,
    accuracy: Interval | None,
    found: Yardsticks | None,
    where: str = "on the validation rows",
) -> str | None:
    """Why the policy phase should not run, by how the reward ranks rows that it has not seen; None if it should.

    Args:
        gate: what it has to beat.
        accuracy: of the reward.
        found: what costs nothing, on the same rows; None where that is not known.
        where: the accuracy was found.

    >>> obstacle("yardsticks", Interval(0.7, 0.6, 0.8, 9), Yardsticks(logp=0.2, length=0.75))
    'the reward (accuracy 0.70 on the validation rows) does not beat the length of an answer (0.75)'
    """
    if gate == "off":
        return None
    if accuracy is None or accuracy.low <= 0.5:
        shown = f"{accuracy.mean:.2f} ({accuracy.low:.2f} to {accuracy.high:.2f})" if accuracy else "unknown"
        return f"the reward does not beat chance {where}: accuracy {shown}"
    if gate == "chance" or found is None:
        return None
    for name, value in (("the policy's own log-prob", found.logp), ("the length of an answer", found.length)):
        if accuracy.mean <= value:
            return f"the reward (accuracy {accuracy.mean:.2f} {where}) does not beat {name} ({value:.2f})"
    return None
