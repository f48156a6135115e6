"""Which completions a reward compares, and its numbers as a policy may be judged by them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from tutelage.groups import Group, drop_copies

__all__ = [
    "TruncatedSamples",
    "contrast",
    "policy_rewards",
    "reward_scale",
]


TruncatedSamples = Literal["floor", "score", "drop"]


def contrast(group: Group, truncated_samples: TruncatedSamples) -> Group | None:
    """The group as a reward should compare it, or None where nothing is left to compare.

    Samples that equal the demonstration go. So do, unless ``truncated_samples`` is "score", those that finished where the
    demonstration was cut or the other way round: telling them apart takes no more than a look at the last token, and a
    reward would learn that and little else.
    """
    group = drop_copies(group)
    finished = group.completions[0].finished
    keep = [
        i
        for i, c in enumerate(group.completions)
        if i > 0 and (truncated_samples == "score" or c.finished == finished)
    ]
    return group.select([0, *keep]) if keep else None


def policy_rewards(group: Group, truncated_samples: TruncatedSamples) -> list[float | None]:
    """Rewards of a scored group's samples as a policy may be judged by them; None for one that is left out.

    ``floor``: a cut sample is never better than the worst of its prompt that finished; where none finished, all are left out,
    because the reward has compared no cut answer with a whole one. ``drop``: cut samples are left out. ``score``: all as
    they are.

    Args:
        group: its first completion is the demonstration; ``rewards`` are known.
    """
    assert group.rewards is not None
    found = list(zip(group.rewards[1:], (c.finished for c in group.completions[1:]), strict=True))
    if truncated_samples == "score":
        return [reward for reward, _ in found]
    if truncated_samples == "drop":
        return [reward if finished else None for reward, finished in found]
    worst = min((reward for reward, finished in found if finished), default=None)
    return [None if worst is None else reward if finished else min(reward, worst) for reward, finished in found]


def reward_scale(rewards: Sequence[Sequence[float | None]]) -> float:
    """What rewards are divided by: their spread within a prompt where that is above 1, else 1.

    Rewards are scaled down, never up: while a reward can hardly tell samples apart, what it says stays quiet.

    Args:
        rewards: of the samples of each prompt; None for one that is left out.

    Returns:
        max(1, root of the mean variance within a prompt).
    """
    told = ([reward for reward in row if reward is not None] for row in rewards)
    variances = [torch.tensor(row).var().item() for row in told if len(row) > 1]
    return max(1.0, (sum(variances) / len(variances)) ** 0.5) if variances else 1.0
