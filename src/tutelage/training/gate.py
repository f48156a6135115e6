"""Whether a reward deserves to move the policy: it must beat chance, and what costs nothing to compute."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tutelage.evaluation.statistics import Interval, bounded_interval
from tutelage.groups import Completion, Group
from tutelage.rewards.comparisons import TruncatedSamples, contrast

__all__ = ["Gate", "Yardsticks", "obstacle", "own_logp", "pair_accuracy", "yardsticks"]

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


def obstacle(gate: Gate, accuracy: Interval | None, found: Yardsticks | None) -> str | None:
    """Why the policy phase should not run, by what the validation rows show of the reward; None if it should.

    >>> obstacle("yardsticks", Interval(0.7, 0.6, 0.8, 9), Yardsticks(logp=0.2, length=0.75))
    'the reward (accuracy 0.70 on the validation rows) does not beat the length of an answer (0.75)'
    """
    if gate == "off":
        return None
    if accuracy is None or accuracy.low <= 0.5:
        shown = f"{accuracy.mean:.2f} ({accuracy.low:.2f} to {accuracy.high:.2f})" if accuracy else "unknown"
        return f"the reward does not beat chance on the validation rows: accuracy {shown}"
    if gate == "chance" or found is None:
        return None
    for name, value in (("the policy's own log-prob", found.logp), ("the length of an answer", found.length)):
        if accuracy.mean <= value:
            return (
                f"the reward (accuracy {accuracy.mean:.2f} on the validation rows) does not beat {name} ({value:.2f})"
            )
    return None
