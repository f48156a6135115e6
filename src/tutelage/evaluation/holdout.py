"""Rows kept from training, on which a run looks at its reward and chooses among its policies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tutelage.evaluation.policy import EvaluationSet
from tutelage.evaluation.statistics import Interval, mean_interval
from tutelage.groups import Group
from tutelage.rewards.base import Reward
from tutelage.rewards.fitting import CutSamples, contrast, reward_scale, with_cut_floor

__all__ = ["Candidate", "Standing", "compare"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A policy that a run passed through, seen through its samples for the rows kept from training.

    Attributes:
        stage: the number of stages that made it; 0 is the start.
        groups: each row's demonstration and samples, with ``old_logps`` under the policy and ``reference_logps``
            under π_0.
        gold: the verifier's score of each sample, by row; None without a verifier.
    """

    stage: int
    groups: list[Group]
    gold: list[list[float]] | None = None

    @staticmethod
    def of(stage: int, groups: list[Group], rows: EvaluationSet) -> Candidate:
        """The policy's samples, scored by the rows' verifier if there is one."""
        gold = None
        if rows.verifier is not None:
            gold = [
                [rows.verify(index, sample.token_ids) for sample in group.completions[1:]]
                for index, group in enumerate(groups)
            ]
        return Candidate(stage, groups, gold)

    @property
    def kl(self) -> float:
        """Estimate of KL(π‖π_0): mean of log π − log π_0 over the samples (nats a sequence)."""
        return float(
            np.mean(
                [
                    now - then
                    for group in self.groups
                    for now, then in zip(group.old_logps[1:], group.reference_logps[1:], strict=True)  # type: ignore[index]
                ]
            )
        )

    @property
    def demonstration_logp(self) -> float:
        """Mean log π of the demonstrations (nats a sequence)."""
        return float(np.mean([group.old_logps[0] for group in self.groups]))  # type: ignore[index]

    def rewards(self, reward: Reward) -> list[list[float]]:
        """Rewards of each row's demonstration and samples."""
        values = iter(reward.score(self.groups).tolist())
        return [[next(values) for _ in group.completions] for group in self.groups]

    def samples(self, rewards: Sequence[Sequence[float]], cut_samples: CutSamples) -> list[list[float]]:
        """What ``rewards`` gives each row's samples, with what is done about cut ones."""
        samples = [list(row[1:]) for row in rewards]
        if cut_samples == "floor":
            ended = [[c.ended for c in group.completions[1:]] for group in self.groups]
            samples = [with_cut_floor(row, whole) for row, whole in zip(samples, ended, strict=True)]
        return samples

    def accuracy(self, rewards: Sequence[Sequence[float]], cut_samples: CutSamples) -> Interval | None:
        """How often the demonstration is over a sample, a row counting once; a tie counts half."""
        rows = []
        for group, values in zip(self.groups, rewards, strict=True):
            compared = contrast(replace(group, rewards=tuple(values)), cut_samples)
            if compared is not None:
                gaps = compared.rewards[0] - np.array(compared.rewards[1:])  # type: ignore[index]
                rows.append(float(np.mean((np.sign(gaps) + 1) / 2)))
        return mean_interval(rows) if rows else None

    def gold_gap(self, samples: Sequence[Sequence[float]]) -> float | None:
        """Mean reward of right samples minus that of wrong ones."""
        if self.gold is None:
            return None
        scored = [
            (reward, gold >= 1)
            for rewards, golds in zip(samples, self.gold, strict=True)
            for reward, gold in zip(rewards, golds, strict=True)
        ]
        right, wrong = [r for r, good in scored if good], [r for r, good in scored if not good]
        return float(np.mean(right) - np.mean(wrong)) if right and wrong else None


@dataclass(frozen=True, slots=True)
class Standing:
    """How a candidate looks through a reward.

    Attributes:
        reward: mean reward of its samples, with the interval over rows.
        accuracy: how often the reward puts a demonstration over a sample; None where nothing can be compared.
        objective: E r / scale − β KL, what the policy phase raises; the scale is that of all candidates compared.
        gold_gap: mean reward of right samples minus that of wrong ones, where there are both.
    """

    candidate: Candidate
    reward: Interval
    accuracy: Interval | None
    objective: float
    gold_gap: float | None

    def to_dict(self, *, chosen: bool) -> dict[str, Any]:
        """An entry of the ``selection`` in results.json."""
        gold = self.candidate.gold
        return {
            "stage": self.candidate.stage,
            "reward": self.reward.mean,
            "reward_low": self.reward.low,
            "reward_high": self.reward.high,
            "kl": self.candidate.kl,
            "objective": self.objective,
            "gold": None if gold is None else float(np.mean(gold)),
            "chosen": chosen,
        }


def compare(
    candidates: Sequence[Candidate], reward: Reward, *, beta: float, cut_samples: CutSamples
) -> list[Standing]:
    """Look at candidates through one reward, on one scale: only differences of a reward mean anything.

    Args:
        candidates: of the same rows.
        beta: weight of the KL, in units of scaled reward a nat.
        cut_samples: as the reward phase treats them.
    """
    rewards = [candidate.rewards(reward) for candidate in candidates]
    samples = [c.samples(values, cut_samples) for c, values in zip(candidates, rewards, strict=True)]
    scale = reward_scale([row for rows in samples for row in rows])
    return [
        Standing(
            candidate=candidate,
            reward=mean_interval([float(np.mean(row)) for row in rows]),
            accuracy=candidate.accuracy(values, cut_samples),
            objective=float(np.mean(rows)) / scale - beta * candidate.kl,
            gold_gap=candidate.gold_gap(rows),
        )
        for candidate, values, rows in zip(candidates, rewards, samples, strict=True)
    ]
