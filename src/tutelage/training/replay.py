"""What contrasts of demonstrations and samples train on: a stage's groups and those replayed with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tutelage.groups import Group, Role, drop_copies
from tutelage.results import CandidateRecord
from tutelage.rewards.base import Reward
from tutelage.training.rollout import Rollout
from tutelage.training.schedule import Draw
from tutelage.training.store import StageStore

__all__ = ["Replay", "pairs", "samples_alone", "spread", "without_copies"]


class Replay:
    """The phase of an algorithm that learns no reward; see ``tutelage.training.stages.Phase``.

    A row trains on its own group and on those of earlier stages that are replayed with it. Replayed groups are scored by this
    stage's reference; their scores lie beside the stage's samples, for inside the stage the policy that gave them is gone.

    Args:
        stages: how many stages before the present one are replayed.
        learnable: what there is to learn from in the groups of a row.
    """

    def __init__(
        self,
        rollout: Rollout,
        store: StageStore,
        learnable: Callable[[Sequence[Group]], list[Group]],
        *,
        stages: int = 0,
    ):
        self.rollout, self.store, self.learnable, self.stages = rollout, store, learnable, stages
        self.reward: Reward | None = None
        self.chooses = False
        self.selection: list[CandidateRecord] = []

    def prepare(
        self, draw: Draw, recorded: dict[int, Group], *, policy: str | None
    ) -> tuple[dict[int, list[Group]], Mapping[str, float]]:
        """See ``Phase.prepare``."""
        stage = draw.stage
        trained: dict[int, list[Group]] = {row: [group] for row, group in recorded.items()}
        for earlier in range(max(0, stage - self.stages), stage):
            name = f"replayed-{earlier:04d}"
            if policy is not None:
                groups = self.store.groups(earlier)
                if not self.rollout.reference_is_initial:
                    groups = self.rollout.rescore(groups)
                self.store.write_groups(stage, name, groups)
            for row, groups in zip(recorded, spread(self.store.groups(stage, name), len(recorded)), strict=True):
                trained[row] += groups
        return {row: self.learnable(groups) for row, groups in trained.items()}, {}

    def reads_from(self, stage: int) -> int:
        """See ``Phase.reads_from``: the samples of the stages that are replayed."""
        return max(0, stage - self.stages)

    def samples_from(self, stage: int) -> int:
        """See ``Phase.samples_from``."""
        return self.reads_from(stage)

    def still_reads(self, stage: int, upcoming: int) -> Sequence[str]:
        """See ``Phase.still_reads``: nothing."""
        return ()

    def leaves(self, stage: int) -> Sequence[str]:
        """See ``Phase.leaves``."""
        return [f"replayed-{earlier:04d}.jsonl" for earlier in range(self.reads_from(stage), stage)]

    def finish(self, stage: int) -> None:
        """Nothing is left to do."""

    def export(self, folder: Path) -> None:
        """Nothing lies beside the policy."""


def without_copies(groups: Sequence[Group]) -> list[Group]:
    """The groups without samples that equal their demonstration."""
    return [drop_copies(group) for group in groups]


def pairs(groups: Sequence[Group]) -> list[Group]:
    """The same, without those that are left with no pair: nothing can be learned from them."""
    return [group for group in without_copies(groups) if group.pairs]


def samples_alone(groups: Sequence[Group]) -> list[Group]:
    """The groups without their demonstrations."""
    return [group.select(group.places(Role.SAMPLE)) for group in groups]


def spread(groups: Sequence[Group], parts: int) -> list[list[Group]]:
    """All groups over so many parts, evenly and in order; no group is left out.

    >>> rows = [Group((1,), row=row) for row in range(5)]
    >>> [[group.row for group in part] for part in spread(rows, 3)]
    [[0, 3], [1, 4], [2]]
    """
    return [list(groups[part::parts]) for part in range(parts)]
