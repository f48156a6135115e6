"""What a reward is: one number for a completion, given its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from tutelage.groups import Group

__all__ = ["Reward", "scores_by_group"]


class Reward(Protocol):
    """Scores the completions of groups. Higher is better; only differences within a prompt are meaningful."""

    def score(self, groups: Sequence[Group]) -> Tensor:
        """Reward of every completion, without gradient.

        Args:
            groups: prompts with their completions.

        Returns:
            [C] float32 on the CPU, groups in order and completions in order within each.
        """
        ...


def scores_by_group(reward: Reward, groups: Sequence[Group]) -> list[tuple[float, ...]]:
    """Rewards of the completions, one tuple per group."""
    values = iter(reward.score(groups).tolist())
    return [tuple(next(values) for _ in group.completions) for group in groups]
