"""RFT: learn a reward from demonstrations vs. answers that are not as good, and improve the policy with it.

Algorithm 1 of Li et al., "Getting More Juice Out of the SFT Data" (NeurIPS 2024, arXiv 2405.17888).
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from tutelage.algorithms.registry import Algorithm
from tutelage.algorithms.rft_labels import RFT_CURVES, rft_card
from tutelage.groups import Group
from tutelage.losses import (
    group_normalized_advantages,
    importance_ratio,
    kl_loss,
    leave_one_out_advantages,
    policy_gradient_loss,
    sft_loss,
)
from tutelage.progress import Progress
from tutelage.ranges import number
from tutelage.results import AlgorithmInfo
from tutelage.rewards.base import Reward
from tutelage.rewards.comparisons import best_of_n, graded
from tutelage.sampling import Sampler
from tutelage.scoring.logps import TokenLogps
from tutelage.training.config import SFT_LEARNING_RATES
from tutelage.training.identity import Data, digest_of_groups, digest_of_rows
from tutelage.training.objective import Step
from tutelage.training.reward_config import RewardStageConfig
from tutelage.training.reward_data import known_demonstrations, make_candidates, read_preferences, with_prompts
from tutelage.training.reward_phase import RewardPhase
from tutelage.training.reward_setup import make_learner, make_negatives, phase_settings, refusal
from tutelage.training.selection import Candidates
from tutelage.training.setup import make_rollout, make_stages, make_store
from tutelage.training.sharding import refuse_sharded
from tutelage.training.trainer import DemonstrationTrainer

__all__ = ["ALGORITHM", "BestOfNObjective", "RFTConfig", "RFTObjective", "RFTTrainer"]

logger = logging.getLogger(__name__)

RFT = AlgorithmInfo(
    "rft",
    "learn a reward from demonstrations over samples, and improve the policy with it",
    "rft.md",
    rft_card,
    RFT_CURVES,
)


@dataclass
class RFTConfig(RewardStageConfig):
    """Settings of RFT's policy phase; those of the reward phase are in ``RewardStageConfig``."""

    # A sixth of SFT's.
    adapter_learning_rate: ClassVar[float] = SFT_LEARNING_RATES["adapter"] / 6
    full_learning_rate: ClassVar[float] = SFT_LEARNING_RATES["full"] / 6

    policy_update: str = field(
        default="gradient",
        metadata={
            "help": (
                "How the reward moves the policy: gradient (policy gradient on all samples), or best_of_n (SFT on the "
                "best sample of a prompt without a demonstration, and on the demonstration where there is one)."
            ),
            "choices": ["gradient", "best_of_n"],
        },
    )

    advantages: str = field(
        default="leave_one_out",
        metadata={
            "help": (
                "Advantage estimator: leave_one_out subtracts the mean reward of the prompt's other samples; "
                "group_normalized subtracts the group's mean and divides by its standard deviation (GRPO), which "
                "amplifies small differences."
            ),
            "choices": ["leave_one_out", "group_normalized"],
        },
    )
    kl: str = field(
        default="reward",
        metadata={
            "help": (
                "Where the KL to π_0 enters: subtracted from each sample's reward, where the leave-one-out baseline "
                "also reduces its variance, or as a separate loss. Both have the same expected gradient at the start "
                "of a stage."
            ),
            "choices": ["reward", "loss"],
        },
    )
    clip_range: Annotated[float, number(0, above=True)] = field(
        default=0.2,
        metadata={"help": "PPO clip range."},
    )


class RFTObjective:
    """Raises E r/s − β KL(π‖π_0) on samples scored by the reward; s is its scale.

    Args:
        beta: weight of the KL to π_0.
        advantages: of the samples of one prompt, from their shaped rewards.
        kl_in_reward: whether the KL is taken off the reward of each sample, or is a loss of its own.
        clip_range: of the importance ratios.
        samples_are_plain: whether samples are the policy's own (temperature 1, whole distribution); only then is their
            mean log-ratio an estimate of the KL.
    """

    uses_dropout = False  # π_t was scored without, and importance ratios should start at 1

    def __init__(
        self,
        *,
        beta: float,
        advantages: Callable[[Tensor], Tensor],
        kl_in_reward: bool,
        clip_range: float,
        samples_are_plain: bool = True,
    ):
        self._beta, self.advantages, self.kl_in_reward, self.clip_range = beta, advantages, kl_in_reward, clip_range
        self.samples_are_plain = samples_are_plain

    def beta(self, stage: int) -> float:
        """The weight of the KL, and hence the temperature of the implicit reward."""
        return self._beta

    def counts(self, groups: Sequence[Group]) -> dict[str, int]:
        """Samples."""
        return {"samples": sum(len(group.completions) for group in groups)}

    def loss(self, tokens: TokenLogps, step: Step) -> Tensor:
        """The policy-gradient loss, averaged over samples."""
        logps_C, old_C = tokens.sums(), tokens.known_sums("old_logps")
        reference_C, rewards_C = tokens.known_sums("reference_logps"), tokens.values("scaled_reward")
        log_ratio_C = (logps_C - reference_C).detach()
        shaped_C = rewards_C - self._beta * log_ratio_C if self.kl_in_reward else rewards_C
        sizes = [len(group.completions) for group in tokens.groups]
        advantages_C = torch.cat([self.advantages(part) for part in shaped_C.split(sizes)])
        losses_C = policy_gradient_loss(logps_C, old_C, advantages_C, clip_range=self.clip_range)
        if not self.kl_in_reward:
            losses_C = losses_C + self._beta * kl_loss(logps_C, reference_C)
        ratio_C = importance_ratio(logps_C, old_C).detach()
        step.track("logps/samples", logps_C)
        step.track("policy/reward", rewards_C)
        step.track("policy/advantage", advantages_C.abs())
        step.track("policy/clip_fraction", ((ratio_C - 1).abs() > self.clip_range).float())
        if self.samples_are_plain:
            step.track("policy/kl", log_ratio_C)
        return losses_C.sum() / max(1, step.counts["samples"])


class BestOfNObjective:
    """Maximum likelihood of the completions that were picked, averaged over their tokens (RAFT, arXiv 2304.06767)."""

    uses_dropout = False

    def __init__(self, beta: float):
        self._beta = beta

    def beta(self, stage: int) -> float:
        """The weight of the KL in the choice among policies."""
        return self._beta

    def counts(self, groups: Sequence[Group]) -> dict[str, int]:
        """Tokens of what was picked."""
        return {"tokens": sum(len(c.token_ids) for group in groups for c in group.completions)}

    def loss(self, tokens: TokenLogps, step: Step) -> Tensor:
        """The mean loss per token."""
        step.track("logps/picked", tokens.sums())
        if picked := [c.values["reward"] for group in tokens.groups for c in group.samples]:
            step.track("policy/reward", picked)
        return sft_loss(tokens.logps_N).sum() / max(1, step.counts["tokens"])


class RFTTrainer(DemonstrationTrainer):
    """Fits a reward stage by stage and trains the policy with samples that it scored.

    Args:
        sampler: draws the samples; by default from the model in memory.
        prompt_dataset: prompts without demonstrations, to sample for too.
        validation_dataset: validation rows; by default some of the training data.
        preference_dataset: preference pairs for a neural reward.
        prompt_source, validation_source, preference_source: what errors about these data call them.
        others: see ``DemonstrationTrainer``.
    """

    args: RFTConfig

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: RFTConfig,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        *,
        sampler: Sampler | None = None,
        prompt_dataset: Dataset | None = None,
        validation_dataset: Dataset | None = None,
        preference_dataset: Dataset | None = None,
        progress: Progress | None = None,
        source: str = "training data",
        eval_source: str = "held-out data",
        prompt_source: str = "prompts",
        validation_source: str = "validation data",
        preference_source: str = "preference data",
    ):
        reward_peft_config = copy.deepcopy(peft_config)  # peft writes the policy's modules and name into it
        super().__init__(
            model,
            args,
            train_dataset,
            eval_dataset,
            processing_class,
            peft_config,
            callbacks,
            optimizers,
            progress=progress,
            source=source,
            eval_source=eval_source,
            info=RFT,
            objective=_objective(args),
        )
        refuse_sharded(self, "rft")
        if reward_peft_config is None and isinstance(self.policy, PeftModel):
            reward_peft_config = copy.deepcopy(self.policy.active_peft_config)
            reward_peft_config.base_model_name_or_path = None
        store = make_store(self)
        rollout = make_rollout(self, sampler, reference_is_initial=True, keep_old=True)
        candidates, demonstrations, held_out = None, [], set()
        if train_dataset is not None:
            candidates, self.train_dataset = make_candidates(
                self, train_dataset, validation_dataset, rollout, store, source=validation_source
            )
            demonstrations = known_demonstrations(self)
            held_out = {group.prompt_ids for group in candidates.rows.groups} if candidates else set()
            self.train_dataset = with_prompts(
                self, prompt_dataset, dict.fromkeys(held_out, "validation rows"), prompt_source
            )
        preferences = read_preferences(preference_dataset, args, self.tokenization, preference_source)
        preferences = [pair for pair in preferences if pair.prompt_ids not in held_out]
        self.other_data = _data(self, candidates, preferences, (prompt_source, validation_source, preference_source))
        negatives = make_negatives(self, demonstrations, rollout, store)
        learner = make_learner(
            self,
            negatives,
            peft_config=reward_peft_config,
            preferences=preferences,
            has_prompts=prompt_dataset is not None,
            tell=logger.warning,
        )
        phase = RewardPhase(
            rollout,
            store,
            learner,
            candidates,
            negatives,
            for_policy=_FOR_POLICY[args.policy_update],
            settings=phase_settings(args),
            refuse=refusal(learner),
            preferences=preferences,
            tokenization=self.tokenization,
            costs=self.costs,
            progress=self.progress,
        )
        self.train_in_stages(
            make_stages(
                self, rollout, store, phase, draws_per_stage=args.samplings_per_stage, epochs=args.policy_epochs
            )
        )

    @property
    def reward(self) -> Reward:
        """The reward as it stands."""
        assert self.stages is not None
        assert self.stages.phase.reward is not None
        return self.stages.phase.reward


def _data(
    trainer: RFTTrainer, candidates: Candidates | None, preferences: list[Group], sources: tuple[str, str, str]
) -> dict[str, Data]:
    """What a run learns from besides demonstrations, for the run's record."""
    found = {}
    prompts, validation, preference = sources
    if trainer.train_dataset is not None:
        rows, digest = digest_of_rows(trainer.train_dataset, prompts_alone=True)
        if rows:
            found["prompts"] = Data(prompts, rows, digest, "prompt_dataset")
    for name, source, groups in (
        ("validation", validation, candidates.rows.groups if candidates else []),
        ("preference", preference, preferences),
    ):
        if groups:
            found[name] = Data(source, len(groups), digest_of_groups(groups), f"{name}_dataset")
    return found


def _objective(args: RFTConfig) -> RFTObjective | BestOfNObjective:
    if args.policy_update == "best_of_n":
        return BestOfNObjective(args.beta)
    return RFTObjective(
        beta=args.beta,
        advantages=_ADVANTAGES[args.advantages],
        kl_in_reward=args.kl == "reward",
        clip_range=args.clip_range,
        samples_are_plain=args.sampling_params(frozenset()).is_plain,
    )


_FOR_POLICY = {"gradient": graded, "best_of_n": best_of_n}
_ADVANTAGES = {"leave_one_out": leave_one_out_advantages, "group_normalized": group_normalized_advantages}


ALGORITHM = Algorithm(RFT, RFTConfig, RFTTrainer)
