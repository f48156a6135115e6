"""Rewards of several members: their mean, or less where they disagree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from tutelage.errors import UserError
from tutelage.files import read_json, write_json
from tutelage.groups import Group
from tutelage.models.paths import ENSEMBLE
from tutelage.rewards.base import Reward, own_logps

__all__ = [
    "Combine",
    "LikelihoodReward",
    "OwnLogpReward",
    "RewardEnsemble",
    "read_ensemble",
    "write_ensemble",
]

Combine = Literal["mean", "mean_minus_std", "min"]


class RewardEnsemble:
    """The mean of members' rewards, the mean minus their standard deviation, or the least.

    Members must agree in their units. Feature rewards do: each is in units of its deviation within a prompt. So do
    reward models trained alike. Before "mean_minus_std" and "min", the mean of each member's rewards within a prompt is
    taken off (and the mean of all members put back), because members that compare within a prompt each add a constant of
    their own to it, which is no disagreement. So an answer that is alone for its prompt loses nothing, and of two answers
    both lose the same by "mean_minus_std".

    Args:
        members: any rewards, two at least.
        combine: how.
    """

    def __init__(self, members: Sequence[Reward], combine: Combine = "mean"):
        if len(members) < 2:
            raise ValueError(f"an ensemble needs two members, not {len(members)}")
        if combine not in get_args(Combine):
            raise ValueError(f"combine is {combine!r}, not 'mean', 'mean_minus_std' or 'min'")
        self.members, self.combine = list(members), combine

    def score(self, groups: Sequence[Group]) -> Tensor:
        """[C] rewards; see ``Reward``."""
        rewards_MC = self._members(groups)
        if self.combine == "mean":
            return rewards_MC.mean(dim=0)
        aligned_MC = _aligned(rewards_MC, groups)
        if self.combine == "min":
            return aligned_MC.min(dim=0).values
        return aligned_MC.mean(dim=0) - aligned_MC.std(dim=0)

    def scores(self, groups: Sequence[Group]) -> list[tuple[float, ...]]:
        """As ``score``, one tuple per group."""
        return [tuple(part.tolist()) for part in self.score(groups).split([len(g.completions) for g in groups])]

    def disagreement(self, groups: Sequence[Group]) -> Tensor:
        """[C] standard deviation of the members' rewards, each less its mean within the prompt; 0 for a lone completion."""
        return _aligned(self._members(groups), groups).std(dim=0)

    def _members(self, groups: Sequence[Group]) -> Tensor:
        """[M, C] the members' rewards."""
        return torch.stack([member.score(groups) for member in self.members])


def _means(rewards_MC: Tensor, groups: Sequence[Group]) -> Tensor:
    """[M, C] each member's mean within the prompt."""
    parts = rewards_MC.split([len(group.completions) for group in groups], dim=1)
    return torch.cat([part.mean(dim=1, keepdim=True).expand_as(part) for part in parts], dim=1)


def _aligned(rewards_MC: Tensor, groups: Sequence[Group]) -> Tensor:
    """[M, C] the members' rewards with the same mean within each prompt."""
    means_MC = _means(rewards_MC, groups)
    return rewards_MC - means_MC + means_MC.mean(dim=0)


def write_ensemble(folder: Path, members: Sequence[Callable[[Path], None]], combine: Combine) -> None:
    """Write an ensemble: each member in a folder of its own, and how they are combined.

    Args:
        members: each writes itself into the folder that it is given.
    """
    for place, write in enumerate(members):
        write(folder / _member(place))
    write_json(folder / ENSEMBLE, {"members": len(members), "combine": combine})


def read_ensemble(folder: Path) -> tuple[list[Path], Combine]:
    """The folders of an ensemble's members, and how they are combined.

    Raises:
        UserError: what says so cannot be read, or a member is missing.
    """
    path = folder / ENSEMBLE
    try:
        content = read_json(path)
        members, combine = [folder / _member(place) for place in range(content["members"])], content["combine"]
        if len(members) < 2 or combine not in get_args(Combine):
            raise ValueError(f"{len(members)} members, combined as {combine!r}")
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"the ensemble cannot be read: {type(error).__name__}: {error}.",
            remedy="Export the run's reward anew.",
            file=str(path),
        ) from error
    for member in members:
        if not member.is_dir():
            raise UserError(
                "the member is missing.", remedy="Copy the whole reward folder of the run.", file=str(member)
            )
    return members, combine


def _member(place: int) -> str:
    return f"member-{place:02d}"


class LikelihoodReward:
    """The mean log-prob of an answer over models (nats per sequence), such as those fine-tuned on folds of demonstrations.

    Args:
        scorers: each gives the log-probs of the tokens of each completion of groups, one list per group, as
            ``cached_token_logps`` of a model does.
    """

    def __init__(self, scorers: Sequence[Callable[[Sequence[Group]], Sequence[Sequence[Sequence[float]]]]]):
        if not scorers:
            raise ValueError("needs at least one scorer")
        self.scorers = list(scorers)

    def score(self, groups: Sequence[Group]) -> Tensor:
        """[C] rewards; see ``Reward``."""
        sums = [[sum(logps) for found in scorer(groups) for logps in found] for scorer in self.scorers]
        return torch.tensor(sums, dtype=torch.float32).mean(dim=0)

    def scores(self, groups: Sequence[Group]) -> list[tuple[float, ...]]:
        """As ``score``, one tuple per group."""
        return [tuple(part.tolist()) for part in self.score(groups).split([len(g.completions) for g in groups])]


class OwnLogpReward:
    """The policy's own log-prob of an answer (nats per sequence): nothing is learned, a policy is made surer of itself.

    Args:
        logps: log-probs of the tokens of each completion of groups under the policy, for those that do not know their
            ``old_logps``.
    """

    def __init__(self, logps: Callable[[Sequence[Group]], Sequence[Sequence[Sequence[float]]]]):
        self.logps = logps

    def score(self, groups: Sequence[Group]) -> Tensor:
        """[C] rewards; see ``Reward``."""
        return torch.tensor(own_logps(groups, self.logps), dtype=torch.float32)
