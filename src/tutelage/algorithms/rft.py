"""RFT: learn an explicit reward from demonstrations against the policy's own samples, and improve the policy with it.

Algorithm 1 of Li et al., "Getting More Juice Out of the SFT Data" (NeurIPS 2024, arXiv 2405.17888).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from tutelage.algorithms.curves import RFT_CURVES, rft_card
from tutelage.errors import UserError
from tutelage.groups import Group
from tutelage.losses import (
    group_normalized_advantages,
    kl_loss,
    leave_one_out_advantages,
    policy_gradient_loss,
)
from tutelage.training.reward_config import RewardStageConfig
from tutelage.training.reward_phase import RewardStageTrainer

__all__ = ["RFTConfig", "RFTTrainer"]


@dataclass
class RFTConfig(RewardStageConfig):
    """Settings of RFT's policy phase; those of its reward phase come with ``RewardStageConfig``."""

    adapter_learning_rate: ClassVar[float] = 5e-6
    full_learning_rate: ClassVar[float] = 2e-7

    advantages: str = field(
        default="leave_one_out",
        metadata={
            "help": "What a sample is judged against: the mean of its prompt's other samples, or that divided by their "
            "spread, which makes small differences loud.",
            "choices": ["leave_one_out", "group_normalized"],
        },
    )
    kl: str = field(
        default="reward",
        metadata={
            "help": "Where the KL to π_0 acts: taken off the reward of each sample, where the leave-one-out baseline "
            "also quiets its noise, or as a loss of its own. Both have the same expected gradient.",
            "choices": ["reward", "loss"],
        },
    )
    clip_range: float = field(
        default=0.2,
        metadata={"help": "A sample stops pulling when its probability changed by this share since it was drawn."},
    )

    def __post_init__(self):
        super().__post_init__()
        if self.clip_range <= 0:
            raise UserError(f"must be above 0, not {self.clip_range:g}.", field="clip_range")


class RFTTrainer(RewardStageTrainer):
    """Raises E r/s − β KL(π‖π_0) on the stage's samples, scored by the reward as the stage updated it; s ≥ 1 is its scale."""

    algorithm: ClassVar[str] = "rft"
    curves = RFT_CURVES
    card = staticmethod(rft_card)
    args: RFTConfig

    def policy_group(self, group: Group) -> Group:
        """The samples of a scored group; the demonstration has taught the reward and is not sampled from the policy."""
        return group.select(range(1, len(group.completions)))

    def counts(self, groups: Sequence[Group]) -> dict[str, int]:
        """Samples."""
        return {"samples": sum(len(group.completions) for group in groups)}

    def loss(self, groups: Sequence[Group], logps_C: Tensor, counts: dict[str, int]) -> Tensor:
        """The policy-gradient loss, averaged over samples."""
        old_C, reference_C, rewards_C = (
            torch.tensor([value for group in groups for value in getattr(group, name)]).to(logps_C)
            for name in ("old_logps", "reference_logps", "rewards")
        )
        log_ratio_C = (logps_C - reference_C).detach()
        shaped_C = rewards_C - self.args.beta * log_ratio_C if self.args.kl == "reward" else rewards_C
        baseline = leave_one_out_advantages if self.args.advantages == "leave_one_out" else group_normalized_advantages
        advantages_C = torch.cat([baseline(part) for part in shaped_C.split([len(g.completions) for g in groups])])
        losses_C = policy_gradient_loss(logps_C, old_C, advantages_C, clip_range=self.args.clip_range)
        if self.args.kl == "loss":
            losses_C = losses_C + self.args.beta * kl_loss(logps_C, reference_C)
        ratio_C = (logps_C - old_C).detach().exp()
        self.track("logps/samples", logps_C)
        self.track("policy/reward", rewards_C)
        self.track("policy/kl", log_ratio_C)
        self.track("policy/advantage", advantages_C.abs())
        self.track("policy/clip_fraction", ((ratio_C - 1).abs() > self.args.clip_range).float())
        return losses_C.sum() / max(1, counts["samples"])
