"""What an algorithm says of its loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from tutelage.groups import Group
from tutelage.scoring.logps import Layout
from tutelage.training.metrics import Track

__all__ = ["Measure", "Measured", "Objective", "Step"]


class Measured(Protocol):
    """What a loss is computed from: numbers of the completion tokens of some groups, with gradient."""

    def sums(self) -> Tensor:
        """[C] of each completion."""
        ...


class Measure(Protocol):
    """Runs the policy on a micro-batch and gives what the objective's loss is computed from.

    The default is ``completion_token_logps``: a ``TokenLogps``. An algorithm that compares distributions hands in its own.
    """

    def __call__(
        self, model: nn.Module, groups: Sequence[Group], /, *, layout: Layout, pad_token_id: int
    ) -> Measured: ...


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

    def loss(self, tokens: Any, step: Step) -> Tensor:
        """The micro-batch's share of the optimizer step's loss.

        Args:
            tokens: what the trainer's ``measure`` gives of the micro-batch, by default a ``TokenLogps``: its groups with the
                log-probs of their completion tokens under the policy, with gradient.
            step: holds ``counts`` of all groups of the optimizer step, to divide by.

        Returns:
            scalar; the shares of the micro-batches add up to the loss of the step.
        """
        ...
