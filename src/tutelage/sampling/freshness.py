"""Does a sampler hold the weights that it was handed? Its log-probs of a few completions beside the trainer's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Freshness", "compare"]

_SURE = 4.0  # standard errors


@dataclass(frozen=True, slots=True)
class Freshness:
    """What the comparison found.

    Attributes:
        gap: mean absolute difference between the sampler's log-probs and the trainer's (nats per token).
        followed: how far the sampler went with the trainer from earlier weights to these: 1 where it holds these, 0 where it
            holds the earlier ones, one half where roundings hide the difference. None where no earlier ones are known.
        error: standard error of ``followed``.
    """

    gap: float
    followed: float | None = None
    error: float = 0.0

    @property
    def is_old(self) -> bool:
        """Whether the sampler surely holds the earlier weights rather than these."""
        return self.followed is not None and self.followed + _SURE * self.error < 0.5

    @property
    def is_new(self) -> bool:
        """Whether the sampler surely holds these weights rather than the earlier ones."""
        return self.followed is not None and self.followed - _SURE * self.error > 0.5

    def problem(self, tolerance: float) -> str | None:
        """Why the sampler does not hold the trainer's weights, in words; None if nothing says so.

        Args:
            tolerance: the largest ``gap`` (nats per token).
        """
        if not self.gap <= tolerance:
            return f"its log-probs differ from the trainer's by {self.gap:.3g} nats per token, above {tolerance:g}"
        if self.is_old:
            return (
                "its log-probs are nearer to the trainer's under earlier weights than to those under the present ones"
            )
        return None


def compare(
    sampler_N: Sequence[float], trainer_N: Sequence[float], earlier_N: Sequence[float] | None = None
) -> Freshness:
    """Compare log-probs of the same tokens.

    A stage of training may change log-probs by less than two programs differ in bfloat16, so the gap alone would not show
    that a sampler was left on the last stage's weights. Over many tokens it shows which of the two the sampler is nearer
    to: ``followed`` is the least-squares slope of its distance from the earlier log-probs on the trainer's.
    Noise of the trainer moves it towards one half, from either side, and never past it.

    Args:
        sampler_N: [N] the sampler's log-probs (nats).
        trainer_N: [N] the trainer's, under the weights that the sampler should hold.
        earlier_N: [N] the trainer's, under other weights that the sampler held before.

    >>> old, new = [-1.0, -2.0, -3.0], [-1.5, -1.0, -3.5]
    >>> compare(new, new, old).followed, compare(old, new, old).followed
    (1.0, 0.0)
    """
    sampler, trainer = np.asarray(sampler_N, dtype=np.float64), np.asarray(trainer_N, dtype=np.float64)
    gap = float(np.abs(sampler - trainer).mean()) if len(sampler) else 0.0
    if earlier_N is None or len(sampler) < 3:
        return Freshness(gap)
    went, change = sampler - np.asarray(earlier_N), trainer - np.asarray(earlier_N)
    square = float(change @ change)
    if not square > 0:
        return Freshness(gap)
    slope = float(went @ change) / square
    # Per token: large changes of few tokens, which are the noisiest, count as often as they occur.
    error = float(np.sqrt((((went - slope * change) * change) ** 2).sum())) / square
    return Freshness(gap, slope, error)
