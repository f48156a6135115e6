"""What an algorithm says of its loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from tutelage.groups import Group
from tutelage.scoring.logps import TokenLogps
from tutelage.training.metrics import Track

__all__ = ["Objective", "Step"]


@dataclass(frozen=True, slots=True)
class Step:
    """What a loss is told of the optimizer step that its micro-batch belongs to.

    Attributes:
        counts: how much there is to average over in the whole step; see ``Objective.counts``.
        stage: number of the stage, from 0; -1 without stages.
        track: adds values to the mean that the next log line shows under a name.
    """

    counts: Mapping[str, int]
    stage: int
    track: Track


class Objective(Protocol):
    """What an algorithm says of its loss.

    Attributes:
        uses_dropout: whether the policy trains with dropout, where its model has some.
    """

    uses_dropout: bool

    def beta(self, stage: int) -> float:
        """The temperature of the implicit reward in a stage: the unit of rewards in evaluations."""
        ...

    def counts(self, groups: Sequence[Group]) -> dict[str, int]:
        """Number of items that the loss averages over, in the groups of an optimizer step."""
        ...

    def loss(self, tokens: TokenLogps, step: Step) -> Tensor:
        """The micro-batch's share of the optimizer step's loss.

        Args:
            tokens: the micro-batch's groups with the log-probs of their completion tokens under the policy, with
                gradient.
            step: holds ``counts`` of all groups of the optimizer step, to divide by.

        Returns:
            scalar; the shares of the micro-batches add up to the loss of the step.
        """
        ...
