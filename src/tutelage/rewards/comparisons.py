"""Which completions a reward compares, and which rewards the policy phase uses."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch

from tutelage.groups import Group, Role, drop_copies

__all__ = [
    "Comparisons",
    "NegativeKind",
    "TruncatedSamples",
    "best_of_n",
    "contrast",
    "graded",
    "hardest_kind",
    "policy_rewards",
    "reward_scale",
]


TruncatedSamples = Literal["floor", "score", "drop"]

NegativeKind = Literal["initial", "own", "out_of_fold"]
"""Whose samples stand beside the demonstrations: the policy's that trained on these prompts, the initial model's, or those of a
policy that trained on other prompts. From easy to hard."""


@dataclass(frozen=True)
class Comparisons:
    """What a reward learns from.

    Attributes:
        paired: by kind of negative, groups with demonstrations (or preferred completions) and samples of the same prompt.
        unpaired: prompts without demonstration, with samples alone. What holds for each demonstration and for no such
            sample tells them apart, if features compare across prompts.
        times: how often a prompt was drawn for a resample, where its groups are there as often; 1 where it is not named.
    """

    paired: Mapping[str, Sequence[Group]]
    unpaired: Sequence[Group] = field(default_factory=tuple)
    times: Mapping[tuple[int, ...], int] = field(default_factory=dict)

    @property
    def paired_groups(self) -> list[Group]:
        """The paired groups of all kinds."""
        return [group for groups in self.paired.values() for group in groups]

    @property
    def prompts(self) -> list[tuple[int, ...]]:
        """The different prompts of the paired groups, in the order in which they first appear."""
        return list(dict.fromkeys(group.prompt_ids for group in self.paired_groups))

    def resampled(self, seed: int) -> Comparisons:
        """As many prompts drawn with replacement, for a bootstrap: the groups of a prompt drawn twice are there twice."""
        generator = random.Random(seed)
        times = Counter(
            prompt
            for prompts in (self.prompts, list(dict.fromkeys(group.prompt_ids for group in self.unpaired)))
            for prompt in generator.choices(prompts, k=len(prompts))
        )

        def drawn(groups: Sequence[Group]) -> list[Group]:
            return [group for group in groups for _ in range(times[group.prompt_ids])]

        return Comparisons({kind: drawn(groups) for kind, groups in self.paired.items()}, drawn(self.unpaired), times)


def hardest_kind(kinds: Collection[str]) -> str | None:
    """The kind of negatives on which to judge a reward, of those that are there.

    Telling demonstrations from what an untrained model writes is easy and says little of telling good answers of a trained
    one from bad ones; and on its training prompts, a trained policy repeats demonstrations.
    """
    return next((kind for kind in (*get_args(NegativeKind)[::-1], *kinds) if kind in kinds), None)


def contrast(group: Group, truncated_samples: TruncatedSamples) -> list[Group]:
    """The group as a reward should compare it: groups with at least one pair each, none where nothing can be compared.

    Samples that equal a demonstration are left out. Unless ``truncated_samples`` is "score", completions that finished are
    compared with each other and truncated ones with each other: telling the ones from the others takes no more than a
    look at the last token, and a reward would learn that and little else.
    """
    group = drop_copies(group)
    if truncated_samples == "score":
        parts = [group]
    else:
        parts = [
            group.select(place for place, c in enumerate(group.completions) if c.finished == finished)
            for finished in (True, False)
        ]
    return [part for part in parts if part.pairs]


def policy_rewards(group: Group, truncated_samples: TruncatedSamples) -> list[float | None]:
    """Rewards of a scored group's samples as the policy phase uses them; None for a sample that is left out.

    ``floor``: a truncated sample is never better than the worst of its prompt that finished; where none finished, all are
    left out, because the reward has compared no truncated answer with a whole one. ``drop``: truncated samples are left
    out. ``score``: all as they are.

    Args:
        group: its samples know their ``reward``.

    Returns:
        one for each sample, in order.
    """
    found = [(c.values["reward"], c.finished) for c in group.samples]
    if truncated_samples == "score":
        return [reward for reward, _ in found]
    if truncated_samples == "drop":
        return [reward if finished else None for reward, finished in found]
    worst = min((reward for reward, finished in found if finished), default=None)
    return [None if worst is None else reward if finished else min(reward, worst) for reward, finished in found]


def reward_scale(rewards: Sequence[Sequence[float | None]], *, down_only: bool = False) -> float:
    """The divisor of the rewards: their standard deviation within a prompt; 1 where they do not vary.

    Prompts whose samples all have the same reward, such as copies of one answer, say nothing of its spread.

    Divided by it, rewards have the same spread whatever the reward's own unit, and the weight of the KL means the same.

    Args:
        rewards: of the samples of each prompt; None for one that is left out.
        down_only: never scale rewards up: while a reward can hardly separate samples, its noise is not amplified.

    Returns:
        root of the mean variance within a prompt; at least 1 with ``down_only``.
    """
    told = ([reward for reward in row if reward is not None] for row in rewards)
    variances = [torch.tensor(row).var().item() for row in told if len(set(row)) > 1]
    spread = (sum(variances) / len(variances)) ** 0.5 if variances else 0.0
    return max(1.0, spread) if down_only else spread or 1.0


def graded(group: Group, truncated_samples: TruncatedSamples, scale: float) -> list[Group]:
    """The samples of a scored group with their rewards as a policy gradient sees them: ``scaled_reward``.

    Nothing where too few are left to compare.
    """
    rewards = policy_rewards(group, truncated_samples)
    scaled = [None if reward is None else reward / scale for reward in rewards]
    group = group.select(group.places(Role.SAMPLE)).with_values("scaled_reward", scaled)
    kept = [place for place, reward in enumerate(scaled) if reward is not None]
    return [group.select(kept)] if len(kept) > 1 else []


def best_of_n(group: Group, truncated_samples: TruncatedSamples, scale: float) -> list[Group]:
    """What a scored group has that is worth imitating: its demonstrations, and without one the best of its samples.

    A truncated sample is never the best, unless such samples are treated like any other. Nothing where all are truncated,
    or where all samples have the same reward.
    """
    if group.demonstrations:
        return [group.select(group.places(Role.DEMONSTRATION))]
    places = group.places(Role.SAMPLE)
    rewards = [
        (reward, place)
        for reward, place in zip(policy_rewards(group, truncated_samples), places, strict=True)
        if reward is not None and (group.completions[place].finished or truncated_samples == "score")
    ]
    if not rewards or len({reward for reward, _ in rewards}) < min(2, len(rewards)):
        return []
    return [group.select([max(rewards, key=lambda found: found[0])[1]])]
