"""Between sampling and the policy's steps: fit a reward, look at it on validation rows, let the policy move or not."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tutelage.data.tokenization import Tokenization
from tutelage.errors import NonFiniteLossError, UserError
from tutelage.evaluation.policy import ranking
from tutelage.files import read_json, write_json, write_json_lines
from tutelage.groups import Group, Role
from tutelage.models.weights import load_weights, save_weights
from tutelage.progress import Progress
from tutelage.results import CandidateRecord
from tutelage.rewards.comparisons import TruncatedSamples, contrast, policy_rewards, reward_scale
from tutelage.rewards.explicit import ExplicitReward
from tutelage.rewards.fitting import RewardFitter
from tutelage.training.metrics import Costs
from tutelage.training.rollout import Rollout
from tutelage.training.selection import Candidates, CandidateScore
from tutelage.training.store import StageStore

__all__ = ["INITIAL_POLICY", "VALIDATION_ROWS", "RewardPhase"]

logger = logging.getLogger(__name__)

VALIDATION_ROWS, INITIAL_POLICY = 1 << 20, 1 << 21
"""Names in the random stream of what is sampled besides a stage's own samples. Validation rows get the same random
numbers at every stage, so that policies differ by less chance."""


class RewardPhase:
    """The phase of an algorithm that learns a reward; see ``tutelage.training.stages.Phase``.

    The reward goes on from where the last stage left it, is fitted to the stage's samples, and scores them. The policy
    is left alone in the first ``warmup_stages``, and in every stage whose reward does not rank the demonstrations of the
    validation rows over fresh samples better than chance. After the last stage the policy is set back to the candidate
    that does best on the validation rows by the last reward and the KL.

    Args:
        rollout: draws samples, for initial-policy negatives too.
        store: the run's stages.
        reward: what is learned.
        fitter: learns it.
        candidates: the policies that the run passes through, seen on the validation rows.
        beta: weight of the KL in the choice among candidates, in units of scaled reward per nat.
        epochs, steps: of a reward phase over its groups; ``steps`` in optimizer steps goes before ``epochs``.
        replay_stages: fit also to the samples of so many stages before.
        warmup_stages: so many stages leave the policy as it is.
        initial_negatives: fit also to samples of the policy that training started with.
        truncated_samples: how truncated completions are treated.
        tokenization: of the policy; the reward is saved with its tokenizer.
        seed: of dropout.
        costs, progress: as in the trainer.
    """

    def __init__(
        self,
        rollout: Rollout,
        store: StageStore,
        reward: ExplicitReward,
        fitter: RewardFitter,
        candidates: Candidates | None,
        *,
        beta: float,
        epochs: int,
        steps: int | None,
        replay_stages: int,
        warmup_stages: int,
        initial_negatives: bool,
        truncated_samples: TruncatedSamples,
        tokenization: Tokenization,
        seed: int,
        costs: Costs,
        progress: Progress,
    ):
        self.rollout, self.store, self.fitter = rollout, store, fitter
        self.reward: ExplicitReward = reward
        self._candidates = candidates
        self.beta, self.epochs, self.steps = beta, epochs, steps
        self.replay_stages, self.warmup_stages = replay_stages, warmup_stages
        self.initial_negatives = initial_negatives
        self.truncated_samples: TruncatedSamples = truncated_samples
        self.tokenization, self.seed, self.costs, self.progress = tokenization, seed, costs, progress
        self.selection: list[CandidateRecord] = []
        self._fitted = -1

    @property
    def candidates(self) -> Candidates:
        """The policies that the run passed through; there are none without training data."""
        assert self._candidates is not None
        return self._candidates

    def prepare(
        self, stage: int, recorded: dict[int, Group], *, policy: str | None
    ) -> tuple[dict[int, list[Group]], Mapping[str, float]]:
        """See ``Phase.prepare``. The policy trains on the samples of each row, or on nothing where it is to stay."""
        path = self.store.path(stage) / "reward.json"
        facts: dict[str, float] = {}
        groups = list(recorded.values())
        if policy is None:
            self._load_reward(stage)
            self.candidates.read(stage)
            found = read_json(path)
            scored = self._with_rewards(groups, self._read_rewards(stage))
        else:
            self._look(stage, policy)
            with self.progress.phase(f"stage {stage}: reward", 0) as advance, self.costs.timed("reward"):
                fit = self._fit(stage, groups, advance)
                scored = self._scored(stage, groups)
                if fit:
                    self._save_reward(stage)
            self._write_rewards(stage, scored)
            with self.costs.timed("validation"):
                found = self._judge(stage, scored, fit)
            write_json(path, found)
            facts = {name: value for name, value in found.items() if isinstance(value, (int, float))}
        if not found["policy/phase"]:
            return {row: [] for row in recorded}, facts
        return {group.row: self._for_policy(group, found["scale"]) for group in scored}, facts

    def finish(self, stage: int) -> None:
        """Set the policy to the candidate that does best on the validation rows by the last reward and the KL."""
        if self._fitted < 0:  # resumed where training had ended
            self._load_reward(stage)
        self._look(stage + 1, self.rollout.begin())
        scores = self._scores()
        best = self.candidates.best(scores)
        self.candidates.restore(best)
        self.selection = [score.record(chosen=stage == best) for stage, score in scores.items()]

    def export(self, folder: Path) -> None:
        """``reward``, as it is at the end."""
        self.reward.save_pretrained(
            folder / "reward",
            self.tokenization.tokenizer,
            max_prompt_length=self.tokenization.max_prompt_length,
            max_completion_length=self.tokenization.max_completion_length,
        )

    # --- fitting ----------------------------------------------------------------------------------------------------

    def _fit(self, stage: int, groups: list[Group], advance: Callable[[int], None]) -> dict[str, float]:
        """The reward phase of the stage; empty if there was nothing to compare."""
        if self._fitted != stage - 1:  # a resumed run: the reward as the last stage left it
            self._load_reward(stage - 1)
        self._fitted = stage
        fitted = groups + self._initial_policy_negatives(stage, groups)
        for earlier in range(max(0, stage - self.replay_stages), stage):
            fitted += self.store.groups(earlier)
        pairs = [pair for group in fitted for pair in contrast(group, self.truncated_samples)]
        if not pairs:
            return {}
        tokens = self.fitter.tokens_done
        with torch.random.fork_rng():  # dropout draws the same numbers in a resumed run
            torch.manual_seed(self.seed + stage)
            facts = self.fitter.fit(
                pairs,
                phase=stage,
                epochs=self.epochs,
                steps=self.steps,
                on_step=lambda done, facts: advance(done),
            )
        if facts["saturated"]:
            logger.warning(
                "stage %d: the reward phase ended after %d steps, its training accuracy at %.2f",
                stage,
                facts["steps"],
                self.fitter.saturation,
            )
        self.costs.reward_tokens += self.fitter.tokens_done - tokens
        return facts

    def _initial_policy_negatives(self, stage: int, groups: list[Group]) -> list[Group]:
        """Samples of π_0 for the stage's rows, where they are asked for and the policy is another by now."""
        if not self.initial_negatives or not self.rollout.has_moved:
            return []
        bare = [group.select(group.places(Role.DEMONSTRATION)) for group in groups]
        drawn = self.rollout.draw(bare, stage=INITIAL_POLICY + stage, initial=True)
        self.store.write_groups(stage, "initial", drawn)
        self._count_samples(drawn)
        return drawn

    def _save_reward(self, stage: int) -> None:
        folder = self.store.path(stage)
        torch.save(self.fitter.state_dict(), folder / "reward-optimizer.pt")
        save_weights(self.reward.parameters, folder / "reward.safetensors")

    def _load_reward(self, stage: int) -> None:
        """The reward and its optimizer as a stage left them; before the first stage they are fresh."""
        self._fitted = stage
        if stage >= 0 and not (self.store.path(stage) / "reward.json").exists():
            raise UserError(
                f"the reward of stage {stage} is missing.",
                remedy="Keep the run's stages folder until the run is over.",
                file=str(self.store.path(stage)),
            )
        while stage >= 0 and not (self.store.path(stage) / "reward.safetensors").exists():
            stage -= 1  # a stage without a pair fits nothing
        if stage >= 0:
            folder = self.store.path(stage)
            load_weights(self.reward.parameters, folder / "reward.safetensors")
            state = torch.load(folder / "reward-optimizer.pt", weights_only=True, map_location="cpu")
            self.fitter.load_state_dict(state)

    # --- scoring ----------------------------------------------------------------------------------------------------

    def _scored(self, stage: int, groups: list[Group]) -> list[Group]:
        scores = self.reward.scores(groups)
        if not np.isfinite(np.concatenate(scores)).all():
            raise NonFiniteLossError(
                f"the reward of a completion is not finite after the reward phase of stage {stage}.",
                remedy="Lower --reward_learning_rate.",
            )
        return self._with_rewards(groups, scores)

    @staticmethod
    def _with_rewards(groups: list[Group], rewards: Sequence[Sequence[float]]) -> list[Group]:
        return [group.with_values("reward", values) for group, values in zip(groups, rewards, strict=True)]

    def _write_rewards(self, stage: int, scored: list[Group]) -> None:
        """One line per prompt, in the order of samples.jsonl: the reward of each completion, in its order."""
        lines = ({"row": group.row, "rewards": group.values("reward")} for group in scored)
        write_json_lines(self.store.path(stage) / "rewards.jsonl", lines)

    def _read_rewards(self, stage: int) -> list[list[float]]:
        return [line["rewards"] for line in self.store.lines(stage, "rewards")]

    def _for_policy(self, group: Group, scale: float) -> list[Group]:
        """The samples with their rewards as the policy phase sees them; nothing where too few are left to compare."""
        rewards = policy_rewards(group, self.truncated_samples)
        scaled = [None if reward is None else reward / scale for reward in rewards]
        group = group.select(group.places(Role.SAMPLE)).with_values("scaled_reward", scaled)
        kept = [place for place, reward in enumerate(scaled) if reward is not None]
        return [group.select(kept)] if len(kept) > 1 else []

    # --- the validation rows ----------------------------------------------------------------------------------------

    def _look(self, stage: int, policy: str) -> None:
        """Record the current policy as a candidate if it has changed."""
        with self.costs.timed("validation"):
            self._count_samples(self.candidates.look(stage, policy))

    def _scores(self) -> dict[int, CandidateScore]:
        """Every candidate through the reward as it is now."""
        return self.candidates.scores(
            self.reward,
            version=self._fitted,
            beta=self.beta,
            truncated_samples=self.truncated_samples,
        )

    def _count_samples(self, groups: Sequence[Group]) -> None:
        self.costs.sampled_tokens += sum(len(c.token_ids) for group in groups for c in group.samples)

    def _judge(self, stage: int, scored: list[Group], fit: dict[str, float]) -> dict[str, Any]:
        """Metrics of the reward phase, and whether the policy phase may follow."""
        demonstrations = [c.values["reward"] for group in scored for c in group.demonstrations]
        samples = [c for group in scored for c in group.samples]
        rewards = [c.values["reward"] for c in samples]
        seen = [policy_rewards(group, self.truncated_samples) for group in scored]
        scores = self._scores()
        score = scores[max(scores)]
        candidate = score.candidate
        found: dict[str, Any] = {f"reward/{name}": value for name, value in fit.items()}
        found |= {
            "reward/demonstrations": float(np.mean(demonstrations)),
            "reward/samples": float(np.mean(rewards)),
            "reward/gap": float(np.mean(demonstrations) - np.mean(rewards)),
            "reward/length_correlation": _correlation(rewards, [len(c.token_ids) for c in samples]),
            "validation/reward": score.reward.mean,
            "validation/kl": candidate.kl,
            "validation/demonstration_logp": candidate.demonstration_logp,
            "scale": reward_scale(seen),
            "samples/left_out": float(np.mean([reward is None for row in seen for reward in row])),
        }
        if self.rollout.params.is_plain:  # else the samples are not the policy's own
            found["policy/entropy"] = _entropy(scored)
        if score.accuracy is not None:
            found |= {"validation/accuracy": score.accuracy.mean, "validation/accuracy_low": score.accuracy.low}
        if candidate.verifier_scores is not None:
            found["validation/verifier_score"] = float(np.mean([s for row in candidate.verifier_scores for s in row]))
        if score.verifier_gap is not None:
            found["validation/verifier_gap"] = score.verifier_gap
        if self.fitter.preferences:
            found["preference/accuracy"] = float(np.mean(ranking(self.reward, self.fitter.preferences[:256])))
        spread = max(float(np.ptp([c.values["reward"] for c in group.samples])) for group in scored)
        reason = self.obstacle(stage, fit, score, spread)
        if reason and stage >= self.warmup_stages:
            logger.warning("stage %d: the policy stays as it is: %s", stage, reason)
        self.candidates.forget_all_but(0, self.candidates.best(scores), max(scores))
        return found | {"policy/phase": int(reason is None), "reason": reason}

    def obstacle(self, stage: int, fit: dict[str, float], score: CandidateScore, spread: float) -> str | None:
        """Why the policy phase should not run; None if it should."""
        if stage < self.warmup_stages:
            return "reward warm-up"
        if not fit:
            return (
                "no sample can be compared with its demonstration, so the reward could not learn: all are equal to it, or "
                "differ from it by being truncated; then start from an SFT checkpoint, raise --max_completion_length or "
                "use --truncated_samples score"
            )
        if spread < 1e-6:
            return "the reward is the same for all samples of each prompt"
        accuracy = score.accuracy
        if accuracy is None or accuracy.low <= 0.5:
            shown = f"{accuracy.mean:.2f} ({accuracy.low:.2f} to {accuracy.high:.2f})" if accuracy else "unknown"
            return f"the reward does not beat chance on the validation rows: accuracy {shown}"
        return None


def _entropy(groups: Sequence[Group]) -> float:
    """Entropy of the policy by its own samples: mean of −log π (nats per token)."""
    samples = [completion for group in groups for completion in group.samples]
    return -sum(c.sum("old_logps") for c in samples) / sum(len(c.token_ids) for c in samples)


def _correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Pearson correlation; 0 if one side does not vary."""
    return float(np.corrcoef(a, b)[0, 1]) if np.std(a) > 0 and np.std(b) > 0 else 0.0
