"""Between sampling and the policy's steps: fit a reward, look at it on validation rows, let the policy move or not."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np

from tutelage.data.tokenization import Tokenization
from tutelage.errors import NonFiniteLossError, UserError
from tutelage.evaluation.policy import ranking
from tutelage.groups import Group, Role
from tutelage.progress import Progress
from tutelage.results import CandidateRecord
from tutelage.rewards.base import Reward, scores_by_group
from tutelage.rewards.comparisons import Comparisons, TruncatedSamples, policy_rewards
from tutelage.training.gate import Gate, Yardsticks, copied_share, cross_validated, obstacle, yardsticks
from tutelage.training.learners import Learner
from tutelage.training.manifest import Manifest
from tutelage.training.metrics import Costs
from tutelage.training.negatives import Negatives
from tutelage.training.reward_facts import facts_of_samples, facts_of_validation, obstacle_to_learning
from tutelage.training.rollout import Rollout
from tutelage.training.schedule import Draw
from tutelage.training.selection import CANDIDATE_FILES, Candidates, CandidateScore
from tutelage.training.store import StageStore
from tutelage.training.termination import leave_if_asked

__all__ = ["VALIDATION_ROWS", "ForPolicy", "RewardPhase", "RewardPhaseSettings"]

logger = logging.getLogger(__name__)

VALIDATION_ROWS = 1 << 20
"""Name in the random stream of what is sampled besides a stage's own samples. Validation rows get the same random
numbers at every stage, so that policies differ by less chance."""

_REWARD = "reward.json"
_STATE = ("reward-*", "reward.safetensors", "member-*")
"""What learners keep of a stage."""

ForPolicy = Callable[[Group, TruncatedSamples, float], list[Group]]
"""From a scored group to what the policy trains on; see ``graded`` and ``best_of_n``."""


@dataclass(frozen=True, slots=True)
class RewardPhaseSettings:
    """Settings of a reward phase.

    Attributes:
        beta: weight of the KL in the choice among candidates, in units of scaled reward per nat.
        down_only: as for ``reward_scale``.
        replay_stages: fit also to the samples of so many stages before; None for all of them.
        warmup_stages: so many stages leave the policy as it is.
        truncated_samples: how truncated completions are treated.
        gate: what a reward must beat on the validation rows before it may move the policy.
        keep_best: set the policy back to the best candidate at the end.
        drop_below: leave out prompts whose best sample lies under this quantile of the demonstrations' own rewards.
    """

    beta: float
    down_only: bool = False
    replay_stages: int | None = None
    warmup_stages: int = 0
    truncated_samples: TruncatedSamples = "floor"
    gate: Gate = "yardsticks"
    keep_best: bool = True
    drop_below: float | None = None


class RewardPhase:
    """The phase of an algorithm that learns a reward; see ``tutelage.training.stages.Phase``.

    At the first draw of a stage the reward is fitted to what the run has sampled and to other negatives. It scores the
    samples of all draws. The policy is left alone in the first ``warmup_stages``, and in every stage whose reward does
    not pass the gate. After the last stage the policy may be set back to the candidate that does best on the validation
    rows by the last reward and the KL.

    Args:
        rollout: draws samples.
        store: the run's stages.
        learner: fits the reward.
        candidates: the policies that the run passes through, seen on the validation rows; None without any.
        negatives: samples that are not the policy's own.
        for_policy: what the policy trains on.
        settings: of the phase.
        refuse: says of scored groups which ones the reward is too unsure of; None refuses nothing.
        preferences: pairs on which the reward is reported too.
        tokenization: of the policy; the reward is saved with its tokenizer.
        costs, progress: as in the trainer.

    Raises:
        UserError: ``drop_below`` of a reward that compares only within a prompt.
    """

    def __init__(
        self,
        rollout: Rollout,
        store: StageStore,
        learner: Learner,
        candidates: Candidates | None,
        negatives: Negatives,
        *,
        for_policy: ForPolicy,
        settings: RewardPhaseSettings,
        refuse: Callable[[Sequence[Group]], list[bool]] | None = None,
        preferences: Sequence[Group] = (),
        tokenization: Tokenization,
        costs: Costs,
        progress: Progress,
    ):
        if settings.drop_below is not None and not learner.compares_across_prompts:
            raise UserError(
                "this reward compares only the answers to one prompt, so no prompt's best can be called too low.",
                remedy="Leave --drop_below out, or use a reward that compares across prompts (--reward_features text).",
                field="drop_below",
            )
        self.rollout, self.store, self.learner, self.negatives = rollout, store, learner, negatives
        self.candidates, self.for_policy, self.settings, self.refuse = candidates, for_policy, settings, refuse
        self.preferences = preferences
        self.tokenization, self.costs, self.progress = tokenization, costs, progress
        self.selection: list[CandidateRecord] = []
        self._fitted = -1

    @property
    def chooses(self) -> bool:
        """See ``Phase.chooses``."""
        return self.candidates is not None and self.settings.keep_best

    @property
    def reward(self) -> Reward:
        """As it stands."""
        return self.learner.reward

    def prepare(
        self, draw: Draw, recorded: dict[int, Group], *, policy: str | None
    ) -> tuple[dict[int, list[Group]], Mapping[str, float]]:
        """See ``Phase.prepare``. The policy trains on the samples of each row, or on nothing where it is to stay."""
        stage, groups = draw.stage, list(recorded.values())
        facts: dict[str, float] = {}
        if policy is None or draw.index:
            if self._fitted != stage:  # resumed inside the stage
                self._load_reward(stage)
            found = self.store.facts(stage, _REWARD)
            scored = groups
            if policy is None:
                scored = self._with_rewards(groups, self._read_rewards(draw))
            elif found["policy/phase"]:
                with self.costs.timed("reward"):
                    scored = self._scored(stage, groups)
                self._write_rewards(draw, scored)
        else:
            self._look(stage, policy)
            comparisons = self._comparisons(stage, groups)
            with self.progress.phase(f"stage {stage}: reward", 0) as advance, self.costs.timed("reward"):
                fit = self._fit(stage, comparisons, advance)
                scored = self._scored(stage, groups)
                self.store.write_some(stage, _STATE, self.learner.save if fit else lambda folder: None)
            if stage == 0:
                self.negatives.count()
            self._write_rewards(draw, scored)
            with self.costs.timed("validation"):
                found = self._judge(stage, scored, comparisons, fit)
            self.store.write_facts(stage, _REWARD, found)
            facts = {name: value for name, value in found.items() if isinstance(value, (int, float))}
        if not found["policy/phase"]:
            return {row: [] for row in recorded}, facts
        return self._for_policy(scored, found), facts

    def reads_from(self, stage: int) -> int:
        """See ``Phase.reads_from``: samples, candidates and the reward of all stages."""
        return 0

    def samples_from(self, stage: int) -> int:
        """See ``Phase.samples_from``: those that the reward is fitted to."""
        replay = self.settings.replay_stages
        return 0 if replay is None else max(0, stage - replay)

    def still_reads(self, stage: int, upcoming: int) -> Sequence[str]:
        """See ``Phase.still_reads``: what was judged, the candidates, and the newest reward that was fitted before ``upcoming``."""
        is_newest = not any(self._has_state(later) for later in range(stage + 1, upcoming))
        return (_REWARD, *CANDIDATE_FILES, *(_STATE if is_newest else ()))

    def _has_state(self, stage: int) -> bool:
        names = Manifest(self.store.path(stage)).files
        return any(fnmatch(name, pattern) for name in names for pattern in _STATE)

    def leaves(self, stage: int) -> Sequence[str]:
        """See ``Phase.leaves``."""
        return (_REWARD, "rewards.jsonl")

    def finish(self, stage: int) -> None:
        """Look at the last policy, and set the policy back to the best candidate if that is wanted."""
        if self._fitted < 0:  # resumed where training had ended
            self._load_reward(stage)
        if self.candidates is None:
            return
        self._look(stage + 1, self.rollout.begin())
        scores = self._scores(self.candidates)
        chosen = max(scores)
        if self.settings.keep_best:
            chosen = self.candidates.best(scores)
            self.candidates.restore(chosen)
        self.selection = [score.record(chosen=stage == chosen) for stage, score in scores.items()]

    def export(self, folder: Path) -> None:
        """``reward``, as it is at the end."""
        self.learner.export(folder / "reward", self.tokenization)

    # --- fitting ----------------------------------------------------------------------------------------------------

    def _comparisons(self, stage: int, groups: list[Group]) -> Comparisons:
        """The stage's first samples, those of earlier stages, and the negatives that are not the policy's own."""
        replay = self.settings.replay_stages
        sampled = list(groups)
        for earlier in range(0 if replay is None else max(0, stage - replay), stage):
            sampled += self.store.sampled(earlier)
        paired: dict[str, list[Group]] = {}
        if "own" in self.negatives.kinds:
            paired["own"] = [group for group in sampled if group.demonstrations]
        return Comparisons(paired | self.negatives.groups(), [group for group in sampled if not group.demonstrations])

    def _fit(self, stage: int, comparisons: Comparisons, advance: Callable[[int], None]) -> dict[str, float]:
        """The reward phase of the stage; empty if there was nothing to compare."""
        if self._fitted != stage - 1:  # a resumed run: the reward as the last stage left it
            self._load_reward(stage - 1)
        self._fitted = stage
        tokens = self.learner.tokens_done
        seen = self.candidates.latest.groups if self.candidates else ()

        def on_step(done: int) -> None:
            advance(done)
            leave_if_asked()

        facts = self.learner.fit(comparisons, stage=stage, validation=seen, on_step=on_step)
        if facts.get("saturated"):
            logger.warning(
                "stage %d: the reward phase ended after %d steps, its training accuracy at %.2f",
                stage,
                facts["steps"],
                facts["accuracy"],
            )
        self.costs.reward_tokens += self.learner.tokens_done - tokens
        return facts

    def _load_reward(self, stage: int) -> None:
        """The reward as a stage left it; before the first stage it is fresh."""
        self._fitted = stage
        if stage >= 0:
            self.store.file(stage, _REWARD)  # raises where it is missing
        self._read_candidates(stage)
        while stage >= 0 and not self.learner.load(self.store.path(stage)):
            stage -= 1  # a stage without a pair fits nothing

    def _read_candidates(self, stage: int) -> None:
        """Those of a run that was killed, as they were when a stage had been judged."""
        if self.candidates:
            self.candidates.read(stage)
            if stage >= 0:
                later = {place for place in self.candidates.kept if place > stage}
                self.candidates.kept = later | set(self.store.facts(stage, _REWARD)["candidates"])

    # --- scoring ----------------------------------------------------------------------------------------------------

    def _scored(self, stage: int, groups: list[Group]) -> list[Group]:
        scores = scores_by_group(self.reward, groups)
        if not np.isfinite(np.concatenate(scores)).all():
            raise NonFiniteLossError(
                f"the reward of a completion is not finite after the reward phase of stage {stage}.",
                remedy="Lower --reward_learning_rate.",
            )
        return self._with_rewards(groups, scores)

    @staticmethod
    def _with_rewards(groups: list[Group], rewards: Sequence[Sequence[float]]) -> list[Group]:
        return [group.with_values("reward", values) for group, values in zip(groups, rewards, strict=True)]

    def _write_rewards(self, draw: Draw, scored: list[Group]) -> None:
        """One line per prompt, in the order of samples.jsonl: the reward of each completion, in its order."""
        lines = ({"row": group.row, "rewards": group.values("reward")} for group in scored)
        self.store.write_lines(draw.stage, "rewards", lines, draw.index)

    def _read_rewards(self, draw: Draw) -> list[list[float]]:
        """What ``_write_rewards`` wrote; nothing is written of a later draw of a stage that leaves the policy alone."""
        if draw.index and not self.store.facts(draw.stage, _REWARD)["policy/phase"]:
            groups = self.store.groups(draw.stage, draw=draw.index)
            return [[0.0] * len(group.completions) for group in groups]
        return [line["rewards"] for line in self.store.lines(draw.stage, "rewards", draw.index)]

    def _for_policy(self, scored: list[Group], found: Mapping[str, Any]) -> dict[int, list[Group]]:
        """What the policy trains on, by row; the samples of a prompt that is left out are not there."""
        refused = self.refuse(scored) if self.refuse else [False] * len(scored)
        treat, prepared = self.settings.truncated_samples, {}
        for group, unsure in zip(scored, refused, strict=True):
            told = [reward for reward in policy_rewards(group, treat) if reward is not None]
            too_low = found["drop_below"] is not None and max(told, default=-math.inf) < found["drop_below"]
            kept = group.select(group.places(Role.DEMONSTRATION)) if unsure or too_low else group
            prepared[group.row] = self.for_policy(kept, treat, found["scale"])
        return prepared

    # --- the validation rows ----------------------------------------------------------------------------------------

    def _look(self, stage: int, policy: str) -> None:
        """Record the current policy as a candidate if it has changed."""
        if self.candidates:
            with self.costs.timed("validation"):
                groups = self.candidates.look(stage, policy)
            self.costs.sampled_tokens += sum(len(c.token_ids) for group in groups for c in group.samples)

    def _scores(self, candidates: Candidates) -> dict[int, CandidateScore]:
        """Every candidate through the reward as it is now."""
        return candidates.scores(
            self.reward,
            version=self._fitted,
            beta=self.settings.beta,
            truncated_samples=self.settings.truncated_samples,
            down_only=self.settings.down_only,
            reads_logps=self.learner.reads_logps,
        )

    def _judge(
        self, stage: int, scored: list[Group], comparisons: Comparisons, fit: dict[str, float]
    ) -> dict[str, Any]:
        """Metrics of the reward phase, and whether the policy phase may follow."""
        found: dict[str, Any] = {f"reward/{name}": value for name, value in fit.items()}
        treat = self.settings.truncated_samples
        found |= facts_of_samples(scored, treat, down_only=self.settings.down_only, plain=self.rollout.params.is_plain)
        found |= self._facts_of_demonstrations(scored, comparisons)
        if self.refuse:
            found["reward/refused"] = float(np.mean(self.refuse(scored)))
        reason = "reward warm-up" if stage < self.settings.warmup_stages else obstacle_to_learning(scored, fit)
        if self.candidates:
            scores = self._scores(self.candidates)
            last = scores[max(scores)]
            measures = yardsticks(last.candidate.groups, treat)
            found |= facts_of_validation(last, measures)
            reason = reason or self._gate(stage, last, measures, fit)
            self.candidates.keep(0, self.candidates.best(scores), max(scores))
            found["candidates"] = sorted(self.candidates.kept)
        if self.preferences:
            found["preference/accuracy"] = float(np.mean(ranking(self.reward, self.preferences[:256])))
        if found.get("samples/copies", 0.0) > 0.5:
            logger.warning(
                "stage %d: %.0f%% of the samples for demonstrated prompts equal the demonstration: a reward and a policy have "
                "little to learn there; give prompts without demonstrations (--prompt_dataset) and negatives that are not "
                "the policy's own (--reward_negatives initial,out_of_fold)",
                stage,
                100 * found["samples/copies"],
            )
        if reason and stage >= self.settings.warmup_stages:
            logger.warning("stage %d: the policy stays as it is: %s", stage, reason)
        return found | {"policy/phase": int(reason is None), "reason": reason}

    def _gate(
        self, stage: int, last: CandidateScore, measures: Yardsticks | None, fit: dict[str, float]
    ) -> str | None:
        """Why the reward may not move the policy; None if it may.

        Rows that the start was trained on tell nothing of a reward, because the policy repeats their demonstrations:
        there the cross-validation of the fit is asked, if there was one.
        """
        gate, held_out = self.settings.gate, cross_validated(fit)
        if gate == "off" or copied_share(last.candidate.groups) <= 0.5:
            return obstacle(gate, last.accuracy, measures)
        if stage == 0:
            logger.warning(
                "most samples for the validation rows equal the demonstration: the start was trained on these rows. %s "
                "Better give rows that it was not trained on: --validation_dataset",
                "The gate goes by out-of-fold samples instead." if held_out else "They tell little of a reward.",
            )
        if held_out is None:
            return obstacle(gate, last.accuracy, measures)
        return obstacle("chance", held_out, None, "on out-of-fold samples, cross-validated")

    def _facts_of_demonstrations(self, scored: list[Group], comparisons: Comparisons) -> dict[str, Any]:
        """Of the demonstrations that the stage sampled beside; where there are none, of all that are compared."""
        rewards = [c.values["reward"] for group in scored for c in group.demonstrations]
        rewards = rewards or self._of_demonstrations(comparisons.paired_groups)
        found: dict[str, Any] = {"drop_below": None}
        if rewards:
            samples = [c.values["reward"] for group in scored for c in group.samples]
            found |= {
                "reward/demonstrations": float(np.mean(rewards)),
                "reward/gap": float(np.mean(rewards) - np.mean(samples)),
            }
        if self.settings.drop_below is not None:
            unseen = self.candidates.rows.groups if self.candidates else None
            if rewards := self._of_demonstrations(unseen or comparisons.paired_groups):
                found["drop_below"] = float(np.quantile(rewards, self.settings.drop_below))
        return found

    def _of_demonstrations(self, groups: Sequence[Group]) -> list[float]:
        """Rewards of the demonstrations of groups, each prompt's once."""
        alone = {(g.row, g.prompt_ids): g.select(g.places(Role.DEMONSTRATION)) for g in groups}
        return [value for values in scores_by_group(self.reward, list(alone.values())) for value in values]
