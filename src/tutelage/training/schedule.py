"""When a stage begins and ends."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, cast

from tutelage.errors import UserError

__all__ = [
    "Draw",
    "StageEpochs",
    "StageSchedule",
]


@dataclass(frozen=True, slots=True)
class StageSchedule:
    """Divides an epoch of optimizer steps into stages of like length.

    Attributes:
        steps_per_epoch: optimizer steps S of an epoch.
        stages_per_epoch: T. Stage i of an epoch holds the steps from ⌊i S / T⌋ up to ⌊(i+1) S / T⌋.
        epochs: how often the steps of a stage are taken before the next begins; an epoch of the data then has
            S · epochs optimizer steps.

    Raises:
        UserError: more stages than steps.

    >>> [StageSchedule(10, 4).bounds(stage) for stage in range(5)]
    [(0, 2), (2, 5), (5, 7), (7, 10), (10, 12)]
    >>> StageSchedule(10, 4).stage_of(7)
    3
    >>> [StageSchedule(3, 2, epochs=2).bounds(stage) for stage in range(3)]
    [(0, 2), (2, 6), (6, 8)]
    """

    steps_per_epoch: int
    stages_per_epoch: int
    epochs: int = 1

    def __post_init__(self):
        if self.stages_per_epoch < 1:
            raise UserError("must be at least 1.", field="stages_per_epoch")
        if self.stages_per_epoch > self.steps_per_epoch:
            raise UserError(
                f"{self.stages_per_epoch} stages do not fit into an epoch of {self.steps_per_epoch} optimizer steps.",
                remedy=f"Use --stages_per_epoch {self.steps_per_epoch} or less, a smaller batch, or more data.",
                field="stages_per_epoch",
            )

    def of_draws(self, per_stage: int | None) -> StageSchedule:
        """The stages, each divided further: at the first step of every part the policy samples anew.

        Args:
            per_stage: parts of a stage; None for as many as it has optimizer steps.

        Raises:
            UserError: more parts than steps.

        >>> [StageSchedule(10, 2).of_draws(2).bounds(draw) for draw in range(4)]
        [(0, 2), (2, 5), (5, 7), (7, 10)]
        """
        parts = self.steps_per_epoch if per_stage is None else self.stages_per_epoch * per_stage
        if parts > self.steps_per_epoch:
            raise UserError(
                f"{self.stages_per_epoch} stages of {per_stage} samplings do not fit into an epoch of "
                f"{self.steps_per_epoch} optimizer steps.",
                remedy="Lower --samplings_per_stage or --stages_per_epoch, or give more prompts.",
                field="samplings_per_stage",
            )
        return replace(self, stages_per_epoch=parts)

    def bounds(self, stage: int) -> tuple[int, int]:
        """First optimizer step of the stage, and the first step after it; steps count from 0 over all epochs."""
        epoch, index = divmod(stage, self.stages_per_epoch)
        first, end = (
            (epoch * self.steps_per_epoch + edge * self.steps_per_epoch // self.stages_per_epoch) * self.epochs
            for edge in (index, index + 1)
        )
        return first, end

    def stage_of(self, step: int) -> int:
        """The stage that an optimizer step belongs to."""
        epoch, step = divmod(step // self.epochs, self.steps_per_epoch)
        # The largest index with ⌊index · S / T⌋ ≤ step.
        index = ((step + 1) * self.stages_per_epoch - 1) // self.steps_per_epoch
        return epoch * self.stages_per_epoch + index


@dataclass(frozen=True, slots=True)
class Draw:
    """One sampling from the policy as it stands.

    Attributes:
        number: from 0, over the whole run; names the samples in the random stream.
        stage: that it belongs to.
        index: its place among the draws of the stage.
    """

    number: int
    stage: int
    index: int = 0


class StageEpochs:
    """A batch sampler that gives the batches of each stage several times over.

    Rows and their order are those of the sampler inside. A last optimizer step that the rows do not fill is filled up
    with empty batches, so that every epoch has the same steps.

    Args:
        batches: the batch sampler inside: lists of row numbers, those of one epoch at each iteration.
        accumulation: micro-batches per optimizer step.
        stages_per_epoch, epochs: as for ``StageSchedule``; where stages have several draws, of the draws.

    >>> list(StageEpochs([[0, 1], [2, 3], [4]], accumulation=2, stages_per_epoch=2, epochs=2))
    [[0, 1], [2, 3], [0, 1], [2, 3], [4], [], [4], []]
    """

    def __init__(self, batches: Collection[list[int]], accumulation: int, stages_per_epoch: int, epochs: int):
        self.batches, self.accumulation = batches, accumulation
        self.schedule = StageSchedule(-(-len(batches) // accumulation), stages_per_epoch, epochs)

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch is next."""
        for part in (self.batches, getattr(self.batches, "sampler", None)):
            if hasattr(part, "set_epoch"):
                cast(Any, part).set_epoch(epoch)

    def __len__(self) -> int:
        """Batches of an epoch, all repetitions together."""
        return self.schedule.steps_per_epoch * self.accumulation * self.schedule.epochs

    def __iter__(self) -> Iterator[list[int]]:
        batches = iter(self.batches)
        schedule = replace(self.schedule, epochs=1)
        for stage in range(schedule.stages_per_epoch):
            first, end = schedule.bounds(stage)
            of_stage = list(islice(batches, (end - first) * self.accumulation))
            of_stage += [[] for _ in range((end - first) * self.accumulation - len(of_stage))]
            for _ in range(self.schedule.epochs):
                yield from of_stage
