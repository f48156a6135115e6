"""RFT: learn an explicit reward from demonstrations vs. the policy's own samples, and improve the policy with it.

Algorithm 1 of Li et al., "Getting More Juice Out of the SFT Data" (NeurIPS 2024, arXiv 2405.17888).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from tutelage.algorithms.registry import Algorithm
from tutelage.algorithms.rft_labels import RFT_CURVES, rft_card
from tutelage.errors import UserError
from tutelage.groups import Group
from tutelage.losses import (
    group_normalized_advantages,
    importance_ratio,
    kl_loss,
    leave_one_out_advantages,
    policy_gradient_loss,
)
from tutelage.progress import Progress
from tutelage.results import AlgorithmInfo
from tutelage.rewards.comparisons import TruncatedSamples
from tutelage.rewards.explicit import ExplicitReward
from tutelage.sampling import Sampler
from tutelage.scoring.logps import TokenLogps
from tutelage.training.objective import Step
from tutelage.training.reward_config import RewardStageConfig
from tutelage.training.reward_phase import RewardPhase
from tutelage.training.reward_setup import make_candidates, make_fitter, make_reward, read_preferences
from tutelage.training.setup import make_rollout, make_stages, make_store
from tutelage.training.trainer import DemonstrationTrainer

__all__ = ["ALGORITHM", "RFTConfig", "RFTObjective", "RFTTrainer"]

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

    adapter_learning_rate: ClassVar[float] = 5e-6
    full_learning_rate: ClassVar[float] = 2e-7

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
    clip_range: float = field(
        default=0.2,
        metadata={"help": "PPO clip range."},
    )

    def __post_init__(self):
        super().__post_init__()
        if self.clip_range <= 0:
            raise UserError(f"must be above 0, not {self.clip_range:g}.", field="clip_range")


class RFTObjective:
    """Raises E r/s − β KL(π‖π_0) on samples scored by the reward; s ≥ 1 is its scale.

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


class RFTTrainer(DemonstrationTrainer):
    """Fits a reward stage by stage and trains on ``RFTObjective`` with the stage's samples, scored by it.

    Args:
        sampler: draws the samples; by default from the model in memory.
        preference_dataset: preference pairs for the reward.
        preference_source: what errors about them call them.
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
        preference_dataset: Dataset | None = None,
        progress: Progress | None = None,
        source: str = "training data",
        eval_source: str = "held-out data",
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
            objective=RFTObjective(
                beta=args.beta,
                advantages=_ADVANTAGES[args.advantages],
                kl_in_reward=args.kl == "reward",
                clip_range=args.clip_range,
                samples_are_plain=args.sampling_params(frozenset()).is_plain,
            ),
        )
        if reward_peft_config is None and isinstance(self.policy, PeftModel):
            reward_peft_config = copy.deepcopy(self.policy.active_peft_config)
            reward_peft_config.base_model_name_or_path = None
        store = make_store(self)
        rollout = make_rollout(self, sampler, reference_is_initial=True, keep_old=True)
        candidates, validation_prompts = None, set()
        if train_dataset is not None:
            candidates, self.train_dataset = make_candidates(self, train_dataset, rollout, store)
            validation_prompts = {group.prompt_ids for group in candidates.rows.groups}
        self.reward: ExplicitReward = make_reward(
            self.policy,
            args,
            self.tokenization,
            layout=self.layout,
            autocast=self.compute_loss_context_manager,
            peft_config=reward_peft_config,
        )
        preferences = read_preferences(preference_dataset, args, self.tokenization, preference_source)
        phase = RewardPhase(
            rollout,
            store,
            self.reward,
            make_fitter(
                self.reward,
                args,
                [pair for pair in preferences if pair.prompt_ids not in validation_prompts],
                self.policy,
            ),
            candidates,
            beta=args.beta,
            epochs=args.reward_epochs,
            steps=args.reward_steps,
            replay_stages=args.reward_replay_stages,
            warmup_stages=args.reward_warmup_stages,
            initial_negatives=args.reward_pairs == "demonstration_vs_sample+initial",
            truncated_samples=cast(TruncatedSamples, args.truncated_samples),
            tokenization=self.tokenization,
            seed=args.seed,
            costs=self.costs,
            progress=self.progress,
        )
        self.train_in_stages(make_stages(self, rollout, store, phase, epochs=args.policy_epochs))


_ADVANTAGES = {"leave_one_out": leave_one_out_advantages, "group_normalized": group_normalized_advantages}


ALGORITHM = Algorithm(RFT, RFTConfig, RFTTrainer)
