"""IRFT: the reward is implicit in the policy, and each stage contrasts demonstrations with the policy's own samples.

Algorithm 2 of Li et al., "Getting More Juice Out of the SFT Data" (NeurIPS 2024, arXiv 2405.17888).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import ClassVar, cast

import torch
from torch import Tensor

from tutelage.algorithms.curves import IMPLICIT_REWARD_CURVES, irft_card
from tutelage.errors import UserError
from tutelage.groups import Group, pair_indices
from tutelage.losses import LossKind, implicit_reward, irft_loss, sft_loss
from tutelage.training.stages import StageConfig, StageTrainer

__all__ = ["IRFTConfig", "IRFTTrainer"]


@dataclass
class IRFTConfig(StageConfig):
    """Settings of IRFT."""

    adapter_learning_rate: ClassVar[float] = 2e-5
    full_learning_rate: ClassVar[float] = 5e-7

    beta: list[float] = field(
        default_factory=lambda: [0.1],
        metadata={
            "help": "Temperature of the implicit reward β log π/π_ref: one number, or one for each stage of an epoch. "
            "Larger keeps the policy nearer to its reference."
        },
    )
    loss_kind: str = field(
        default="logistic",
        metadata={
            "help": "The decreasing function of the margin: logistic (DPO's and SPIN's), hinge, or linear (has no lower "
            "bound).",
            "choices": ["logistic", "hinge", "linear"],
        },
    )
    sft_weight: float = field(
        default=0.0, metadata={"help": "Adds the demonstrations' SFT loss (nats per token) with this weight."}
    )

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.beta, (int, float)):
            self.beta = [float(self.beta)]
        if len(self.beta) not in (1, self.stages_per_epoch):
            raise UserError(
                f"{len(self.beta)} values for {self.stages_per_epoch} stages.",
                remedy="Give one number, or one for each stage of an epoch.",
                field="beta",
            )
        if min(self.beta) <= 0:
            raise UserError("must be above 0.", field="beta")


class IRFTTrainer(StageTrainer):
    """Minimizes h(β[log π(y|x) − log π_t(y|x) − log π(ỹ|x) + log π_t(ỹ|x)]) with ỹ drawn from π_t, stage by stage."""

    algorithm: ClassVar[str] = "irft"
    curves = IMPLICIT_REWARD_CURVES
    card = staticmethod(irft_card)
    args: IRFTConfig

    @property
    def beta(self) -> float:
        """The temperature of the current stage."""
        return self.args.beta[max(0, self.stage) % len(self.args.beta)]

    @property
    def needs_samples(self) -> bool:
        """The SFT term learns from a demonstration alone."""
        return not self.args.sft_weight

    def counts(self, groups: Sequence[Group]) -> dict[str, int]:
        """Pairs of a demonstration and a sample; demonstration tokens."""
        return {
            "pairs": sum(len(group.completions) - 1 for group in groups),
            "demonstration_tokens": sum(len(group.completions[0].token_ids) for group in groups),
        }

    def loss(self, groups: Sequence[Group], logps_C: Tensor, counts: dict[str, int]) -> Tensor:
        """The contrast, averaged over pairs, and the SFT term, averaged over demonstration tokens."""
        reference_C = torch.tensor([logp for group in groups for logp in group.reference_logps or ()]).to(logps_C)
        # Every sample forms a pair with the demonstration that leads its group.
        demonstrations, samples = pair_indices(groups)
        policy_P, policy_samples_P = logps_C[demonstrations], logps_C[samples]
        reference_P, reference_samples_P = reference_C[demonstrations], reference_C[samples]
        losses_P = irft_loss(
            policy_P,
            policy_samples_P,
            reference_P,
            reference_samples_P,
            beta=self.beta,
            kind=cast(LossKind, self.args.loss_kind),
        )
        loss = losses_P.sum() / max(1, counts["pairs"])
        if self.args.sft_weight:
            leading = [0, *accumulate(len(group.completions) for group in groups[:-1])]
            loss = loss + self.args.sft_weight * sft_loss(logps_C[leading]).sum() / counts["demonstration_tokens"]
        rewards_P = implicit_reward(policy_P, reference_P, beta=self.beta)
        sample_rewards_P = implicit_reward(policy_samples_P, reference_samples_P, beta=self.beta)
        self.track("logps/demonstrations", policy_P)
        self.track("logps/samples", policy_samples_P)
        self.track("rewards/demonstrations", rewards_P)
        self.track("rewards/samples", sample_rewards_P)
        margins_P = rewards_P - sample_rewards_P
        self.track("rewards/margin", margins_P)
        # A tie counts half: at a stage's first step every margin is zero.
        self.track("rewards/accuracy", (margins_P.sign() + 1) / 2)
        return loss
