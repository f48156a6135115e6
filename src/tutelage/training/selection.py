"""Candidate policies of a run, evaluated on the validation rows, and the choice among them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from tutelage.errors import UserError
from tutelage.evaluation.policy import EvaluationSet
from tutelage.evaluation.statistics import Interval, mean_interval
from tutelage.groups import Group
from tutelage.models.weights import load_weights, save_weights
from tutelage.results import CandidateRecord
from tutelage.rewards.base import Reward, scores_by_group
from tutelage.rewards.comparisons import TruncatedSamples, policy_rewards, reward_scale
from tutelage.training.gate import pair_accuracy
from tutelage.training.store import StageStore

__all__ = ["CANDIDATE_FILES", "Candidate", "CandidateScore", "Candidates", "compare"]

_CANDIDATE, _SAMPLES, _WEIGHTS = "candidate.json", "validation.jsonl", "policy.safetensors"
CANDIDATE_FILES = (_CANDIDATE, _SAMPLES, _WEIGHTS)
"""What lies in a stage's folder of the candidate that began it."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A policy that the run passed through, with its samples for the validation rows.

    Attributes:
        stage: the number of stages that made it; 0 is the start.
        groups: each row's demonstrations and samples, with ``old_logps`` under the policy and ``reference_logps``
            under π_0.
        verifier_scores: the verifier's score of each sample, by row; None without a verifier.
        known: ``kl`` and ``demonstration_logp`` where the groups do not tell them any more.
    """

    stage: int
    groups: list[Group]
    verifier_scores: list[list[float]] | None = None
    known: tuple[float, float] | None = None

    @staticmethod
    def of(stage: int, groups: list[Group], rows: EvaluationSet) -> Candidate:
        """The policy's samples, scored by the rows' verifier if there is one."""
        scores = None
        if rows.verifier is not None:
            scores = [
                [rows.verify(index, sample.token_ids) for sample in group.samples]
                for index, group in enumerate(groups)
            ]
        return Candidate(stage, groups, scores)

    @property
    def kl(self) -> float:
        """Estimate of KL(π‖π_0): mean of log π − log π_0 over the samples (nats per sequence)."""
        if self.known is not None:
            return self.known[0]
        return float(
            np.mean([c.sum("old_logps") - c.sum("reference_logps") for group in self.groups for c in group.samples])
        )

    @property
    def demonstration_logp(self) -> float:
        """Mean log π of the demonstrations (nats per sequence)."""
        if self.known is not None:
            return self.known[1]
        return float(np.mean([c.sum("old_logps") for g in self.groups for c in g.demonstrations]))

    def without_logps(self, ids: dict[int, int]) -> Candidate:
        """The same in a sixth of the memory: its groups keep their tokens, and no number per token.

        Args:
            ids: every token id that is known, once.
        """
        groups = [
            replace(
                group,
                completions=tuple(
                    replace(c, token_ids=tuple(ids.setdefault(token, token) for token in c.token_ids), token_values={})
                    for c in group.completions
                ),
            )
            for group in self.groups
        ]
        return replace(self, groups=groups, known=(self.kl, self.demonstration_logp))

    def scored(self, reward: Reward, *, reads_logps: bool = False) -> list[Group]:
        """The groups with the ``reward`` of each completion.

        Args:
            reads_logps: the reward reads log-probs of the policy. It is then not told those under the policy that drew the
                samples: it would judge every candidate by another policy, and prefer the surest of itself.
        """
        groups = [group.without("old_logps") for group in self.groups] if reads_logps else self.groups
        rewards = scores_by_group(reward, groups)
        return [group.with_values("reward", values) for group, values in zip(self.groups, rewards, strict=True)]

    def verifier_gap(self, rewards: Sequence[Sequence[float]]) -> float | None:
        """Mean reward of right samples minus that of wrong ones."""
        if self.verifier_scores is None:
            return None
        told = [
            (reward, score >= 1)
            for row, scores in zip(rewards, self.verifier_scores, strict=True)
            for reward, score in zip(row, scores, strict=True)
        ]
        right, wrong = [r for r, good in told if good], [r for r, good in told if not good]
        return float(np.mean(right) - np.mean(wrong)) if right and wrong else None


@dataclass(frozen=True, slots=True)
class CandidateScore:
    """A candidate evaluated with a reward.

    Attributes:
        reward: mean reward of its samples, with the interval over rows.
        accuracy: how often the reward puts a demonstration over a sample; None where nothing can be compared.
        objective: E r / scale − β KL, what the policy phase raises; the scale is that of all candidates compared.
        verifier_gap: mean reward of right samples minus that of wrong ones, where there are both.
    """

    candidate: Candidate
    reward: Interval
    accuracy: Interval | None
    objective: float
    verifier_gap: float | None

    def record(self, *, chosen: bool) -> CandidateRecord:
        """An entry of the ``selection`` in results.json."""
        return CandidateRecord(
            stage=self.candidate.stage,
            reward=self.reward.mean,
            reward_low=self.reward.low,
            reward_high=self.reward.high,
            kl=self.candidate.kl,
            objective=self.objective,
            **_verifier_score(self.candidate.verifier_scores),
            chosen=chosen,
        )


def compare(
    candidates: Sequence[Candidate],
    scored: Sequence[Sequence[Group]],
    *,
    beta: float,
    truncated_samples: TruncatedSamples,
    down_only: bool = False,
) -> list[CandidateScore]:
    """Evaluate all candidates with the same reward and scale, because only differences of a reward are meaningful.

    Args:
        candidates: of the same rows.
        scored: what ``Candidate.scored`` gives of each.
        beta: weight of the KL, in units of scaled reward per nat.
        truncated_samples: as the reward phase treats them.
        down_only: as for ``reward_scale``.
    """
    samples = [[policy_rewards(group, truncated_samples) for group in groups] for groups in scored]
    scale = reward_scale([row for rows in samples for row in rows], down_only=down_only)
    told = [reward for rows in samples for row in rows for reward in row if reward is not None]
    # A sample that is left out is a truncated one: a policy must not gain by truncating more.
    lowest = min(told, default=0.0)
    counted = [[[lowest if reward is None else reward for reward in row] for row in rows] for rows in samples]
    return [
        CandidateScore(
            candidate=candidate,
            reward=mean_interval([float(np.mean(row)) for row in rows]),
            accuracy=pair_accuracy(groups, lambda c: c.values["reward"], truncated_samples),
            objective=float(np.mean(rows)) / scale - beta * candidate.kl,
            verifier_gap=candidate.verifier_gap(rows),
        )
        for candidate, groups, rows in zip(candidates, scored, counted, strict=True)
    ]


def _verifier_score(scores: list[list[float]] | None) -> dict[str, float | None]:
    """Mean verifier score with its 95% bounds over rows; None without a verifier."""
    if scores is None:
        return {"verifier_score": None, "verifier_score_low": None, "verifier_score_high": None}
    found = mean_interval([float(np.mean(row)) for row in scores])
    return {"verifier_score": found.mean, "verifier_score_low": found.low, "verifier_score_high": found.high}


class Candidates:
    """Records the policies of a run next to its stages, and restores one of them at the end.

    Attributes:
        by_stage: all candidates.
        kept: the stages of those that can still be chosen. It is what the run decided and not which files there are: a
            resumed run that goes back some stages decides as the first one did.

    Args:
        store: the run's stages.
        rows: the validation rows.
        policy: whose trained weights are recorded.
        draw: gives the rows' groups with samples, ``old_logps`` and ``reference_logps`` of the policy as it stands.
    """

    def __init__(
        self,
        store: StageStore,
        rows: EvaluationSet,
        policy: nn.Module,
        draw: Callable[[list[Group]], list[Group]],
    ):
        self.store, self.rows, self.policy, self.draw = store, rows, policy, draw
        self.by_stage: dict[int, Candidate] = {}
        self.kept: set[int] = set()
        self._ids: dict[int, int] = {}
        self._last = ""
        self._scored: dict[int, list[Group]] = {}
        self._scored_by: int | None = None

    @property
    def latest(self) -> Candidate:
        """The one that was recorded last."""
        return self.by_stage[max(self.by_stage)]

    def look(self, stage: int, policy: str) -> list[Group]:
        """Record the current policy, unless it is unchanged since the last record.

        Args:
            policy: its fingerprint.

        Returns:
            the validation rows' groups if they were sampled for this look, by this process or by one that was killed;
            else none.
        """
        self.read(stage - 1)
        is_known = self.store.has(stage, _CANDIDATE) and self.store.has(stage, _SAMPLES)
        if is_known and self._facts(stage)["policy"] == policy and self._is_of_these_rows(stage):
            self.read(stage)
            if not self.store.has(stage, _WEIGHTS):  # forgotten by a run that had come further
                self._save(stage)
            return self.by_stage[stage].groups
        self.store.forget(stage, _CANDIDATE)
        if self._last == policy:
            return []
        groups = self.draw(self.rows.groups)
        self.store.write_groups(stage, "validation", groups)
        self._save(stage)
        facts = {"policy": policy, "stage": stage, "settings": self.store.settings}
        self.store.write_facts(stage, _CANDIDATE, facts)
        self._add(stage, groups, policy)
        return groups

    def _save(self, stage: int) -> None:
        self.store.write_with(stage, _WEIGHTS, lambda path: save_weights(self._weights, path))

    def _add(self, stage: int, groups: list[Group], policy: str) -> None:
        if self.by_stage:  # one more for every stage: a long run must not fill the memory with what it needs no more
            self.by_stage[max(self.by_stage)] = self.latest.without_logps(self._ids)
        self.by_stage[stage] = Candidate.of(stage, groups, self.rows)
        self.kept.add(stage)
        self._last = policy

    def read(self, last: int) -> None:
        """Load candidates that a killed run left, up to a stage.

        Raises:
            UserError: they are of other rows or were drawn under other settings.
        """
        for stage in range(last + 1):
            if stage in self.by_stage or not self.store.has(stage, _CANDIDATE):
                continue
            if not self._is_of_these_rows(stage):
                raise UserError(
                    "the validation rows, or the sampling settings, differ from the first run's.",
                    remedy="Resume with the data and settings of the first run.",
                    file=str(self.store.path(stage) / _CANDIDATE),
                )
            self._add(stage, self.store.groups(stage, "validation"), self._facts(stage)["policy"])

    def scores(
        self,
        reward: Reward,
        *,
        version: int,
        beta: float,
        truncated_samples: TruncatedSamples,
        down_only: bool = False,
        reads_logps: bool = False,
    ) -> dict[int, CandidateScore]:
        """All candidates evaluated with a reward, by stage in order.

        Args:
            version: names the state of the reward; what it scored once it is not asked again.
            reads_logps: as for ``Candidate.scored``.
        """
        if reads_logps or version != self._scored_by:  # the policy may have moved since
            self._scored, self._scored_by = {}, version
        stages = sorted(self.by_stage)
        for stage in stages:
            if stage not in self._scored:
                self._scored[stage] = self.by_stage[stage].scored(reward, reads_logps=reads_logps)
        found = compare(
            [self.by_stage[stage] for stage in stages],
            [self._scored[stage] for stage in stages],
            beta=beta,
            truncated_samples=truncated_samples,
            down_only=down_only,
        )
        return dict(zip(stages, found, strict=True))

    def best(self, scores: dict[int, CandidateScore]) -> int:
        """The stage with the highest objective among those that are kept; of equal ones the first."""
        return max(sorted(self.kept & scores.keys()), key=lambda stage: scores[stage].objective)

    def keep(self, *stages: int) -> None:
        """Remove the weights of the other candidates; their samples stay."""
        self.kept &= set(stages)
        for stage in self.by_stage.keys() - set(stages):
            self.store.forget(stage, _WEIGHTS)

    def restore(self, stage: int) -> None:
        """Set the policy back to a candidate.

        Raises:
            DamagedFileError: its weights are missing, or are not as they were written.
        """
        load_weights(self._weights, self.store.file(stage, _WEIGHTS))

    @property
    def _weights(self) -> list[nn.Parameter]:
        return [p for p in self.policy.parameters() if p.requires_grad]

    def _facts(self, stage: int) -> dict[str, Any]:
        return self.store.facts(stage, _CANDIDATE)

    def _is_of_these_rows(self, stage: int) -> bool:
        """Whether a recorded candidate answers the validation rows of this run, under its settings."""
        found = [(group.prompt_ids, group.demonstrations) for group in self.store.groups(stage, "validation")]
        return (
            found == [(group.prompt_ids, group.demonstrations) for group in self.rows.groups]
            and self._facts(stage)["settings"] == self.store.settings
        )
