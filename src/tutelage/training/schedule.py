"""When a stage begins and ends."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from tutelage.errors import UserError

__all__ = [
    "StageEpochs",
    "StageSchedule",
]


@dataclass(frozen=True, slots=True)
class StageSchedule:
    """Cuts an epoch of optimizer steps into stages of like length.

    Attributes:
        steps_per_epoch: optimizer steps S of an epoch.
        stages_per_epoch: T. Stage i of an epoch holds the steps from ⌊i S / T⌋ up to ⌊(i+1) S / T⌋.
        passes: how often the steps of a stage are taken before the next begins; an epoch then has S · passes steps.

    Raises:
        UserError: more stages than steps.

    >>> [StageSchedule(10, 4).bounds(stage) for stage in range(5)]
    [(0, 2), (2, 5), (5, 7), (7, 10), (10, 12)]
    >>> StageSchedule(10, 4).stage_of(7)
    3
    >>> [StageSchedule(3, 2, passes=2).bounds(stage) for stage in range(3)]
    [(0, 2), (2, 6), (6, 8)]
    """

    steps_per_epoch: int
    stages_per_epoch: int
    passes: int = 1

    def __post_init__(self):
        if self.stages_per_epoch < 1:
            raise UserError("must be at least 1.", field="stages_per_epoch")
        if self.stages_per_epoch > self.steps_per_epoch:
            raise UserError(
                f"{self.stages_per_epoch} stages do not fit into an epoch of {self.steps_per_epoch} optimizer steps.",
                remedy=f"Use --stages_per_epoch {self.steps_per_epoch} or less, a smaller batch, or more data.",
                field="stages_per_epoch",
            )

    def bounds(self, stage: int) -> tuple[int, int]:
        """First optimizer step of the stage, and the first step after it; steps count from 0 over all epochs."""
        epoch, index = divmod(stage, self.stages_per_epoch)
        first, end = (
            (epoch * self.steps_per_epoch + edge * self.steps_per_epoch // self.stages_per_epoch) * self.passes
            for edge in (index, index + 1)
        )
        return first, end

    def stage_of(self, step: int) -> int:
        """The stage that an optimizer step belongs to."""
        epoch, step = divmod(step // self.passes, self.steps_per_epoch)
        # The largest index with ⌊index · S / T⌋ ≤ step.
        index = ((step + 1) * self.stages_per_epoch - 1) // self.steps_per_epoch
        return epoch * self.stages_per_epoch + index


class StageEpochs:
    """Batches of row numbers for a data loader, those of each stage several times over. Rows are shuffled each epoch.

    An optimizer step that the last rows do not fill is left out.

    Args:
        rows: of the data set.
        batch_size: rows of a micro-batch.
        accumulation: micro-batches of an optimizer step.
        stages_per_epoch, passes: as for ``StageSchedule``.
        seed: of the shuffling, together with the epoch.
    """

    def __init__(self, rows: int, batch_size: int, accumulation: int, stages_per_epoch: int, passes: int, seed: int):
        self.rows, self.batch_size, self.accumulation, self.seed = rows, batch_size, accumulation, seed
        self.schedule = StageSchedule(-(-rows // batch_size) // accumulation, stages_per_epoch)
        self.passes, self.epoch = passes, 0

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch is next."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Micro-batches of an epoch, all passes together."""
        return self.schedule.steps_per_epoch * self.accumulation * self.passes

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.rows, generator=generator).tolist()
        batches = [order[start : start + self.batch_size] for start in range(0, self.rows, self.batch_size)]
        for stage in range(self.schedule.stages_per_epoch):
            first, end = self.schedule.bounds(stage)
            for _ in range(self.passes):
                yield from batches[first * self.accumulation : end * self.accumulation]
