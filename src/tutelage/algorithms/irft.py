"""IRFT: the reward is implicit in the policy, and each stage contrasts demonstrations with the policy's own samples.

Algorithm 2 of Li et al., "Getting More Juice Out of the SFT Data" (NeurIPS 2024, arXiv 2405.17888).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, cast

from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from tutelage.algorithms.registry import Algorithm
from tutelage.errors import UserError
from tutelage.groups import Group, Role, pair_indices
from tutelage.losses import LossKind, implicit_reward, irft_loss, sft_loss
from tutelage.progress import Progress
from tutelage.ranges import number
from tutelage.results import AlgorithmInfo, Curve, RunRecord
from tutelage.sampling import Sampler
from tutelage.scoring.logps import TokenLogps
from tutelage.training.objective import Step
from tutelage.training.replay import Replay, pairs, without_copies
from tutelage.training.setup import make_rollout, make_stages, make_store
from tutelage.training.stage_config import StageConfig
from tutelage.training.trainer import DemonstrationTrainer

__all__ = ["ALGORITHM", "IRFT", "IRFTConfig", "IRFTObjective", "IRFTTrainer", "contrast_in_stages"]


@dataclass
class IRFTConfig(StageConfig):
    """Settings of IRFT."""

    adapter_learning_rate: ClassVar[float] = 2e-5
    full_learning_rate: ClassVar[float] = 5e-7

    beta: Annotated[list[float], number(0, above=True)] = field(
        default_factory=lambda: [0.1],
        metadata={
            "help": (
                "β, temperature of the implicit reward β log π/π_ref: one number, or one per stage of an epoch. "
                "Larger values keep the policy closer to its reference."
            ),
        },
    )
    loss_kind: str = field(
        default="logistic",
        metadata={
            "help": (
                "Decreasing function of the margin: logistic (as in DPO and SPIN), hinge, or linear (no lower bound)."
            ),
            "choices": ["logistic", "hinge", "linear"],
        },
    )
    sft_weight: Annotated[float, number(0)] = field(
        default=0.0,
        metadata={"help": "Weight of an added SFT loss on the demonstrations, in nats per token."},
    )

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.beta, (int, float)):
            self.beta = [float(self.beta)]
        if len(self.beta) not in (1, self.stages_per_epoch):
            raise UserError(
                f"{len(self.beta)} values for {self.stages_per_epoch} stages.",
                remedy="Give one number, or one per stage of an epoch.",
                field="beta",
            )


class IRFTObjective:
    """h(β[log π(y|x) − log π_t(y|x) − log π(ỹ|x) + log π_t(ỹ|x)]) over pairs of a demonstration y and a sample ỹ.

    Args:
        betas: temperature of each stage of an epoch, or one for all.
        kind: the function h.
        sft_weight: adds the SFT loss of the demonstrations (nats per token).
    """

    uses_dropout = True

    def __init__(self, betas: Sequence[float], kind: LossKind = "logistic", sft_weight: float = 0.0):
        self.betas, self.sft_weight = betas, sft_weight
        self.kind: LossKind = kind

    @staticmethod
    def of(args: IRFTConfig) -> IRFTObjective:
        """As the settings say."""
        return IRFTObjective(args.beta, cast(LossKind, args.loss_kind), args.sft_weight)

    def beta(self, stage: int) -> float:
        """The temperature of a stage."""
        return self.betas[max(0, stage) % len(self.betas)]

    def counts(self, groups: Sequence[Group]) -> dict[str, int]:
        """Pairs of a demonstration and a sample; demonstration tokens."""
        return {
            "pairs": sum(len(group.pairs) for group in groups),
            "demonstration_tokens": sum(len(c.token_ids) for group in groups for c in group.demonstrations),
        }

    def loss(self, tokens: TokenLogps, step: Step) -> Tensor:
        """The contrast, averaged over pairs, and the SFT term, averaged over demonstration tokens."""
        beta = self.beta(step.stage)
        policy_C, reference_C = tokens.sums(), tokens.known_sums("reference_logps")
        better, worse = map(tokens.index, pair_indices(tokens.groups))
        policy_P, policy_samples_P = policy_C[better], policy_C[worse]
        reference_P, reference_samples_P = reference_C[better], reference_C[worse]
        losses_P = irft_loss(policy_P, policy_samples_P, reference_P, reference_samples_P, beta=beta, kind=self.kind)
        loss = losses_P.sum() / max(1, step.counts["pairs"])
        if self.sft_weight:
            demonstration_logps = tokens.sums_of(Role.DEMONSTRATION)
            loss = loss + self.sft_weight * sft_loss(demonstration_logps).sum() / max(
                1, step.counts["demonstration_tokens"]
            )
        rewards_P = implicit_reward(policy_P, reference_P, beta=beta)
        sample_rewards_P = implicit_reward(policy_samples_P, reference_samples_P, beta=beta)
        margins_P = rewards_P - sample_rewards_P
        step.track("logps/demonstrations", policy_P)
        step.track("logps/samples", policy_samples_P)
        step.track("rewards/demonstrations", rewards_P)
        step.track("rewards/samples", sample_rewards_P)
        step.track("rewards/margin", margins_P)
        # A tie counts half: at the first step of a stage every margin is zero.
        step.track("rewards/accuracy", (margins_P.sign() + 1) / 2)
        return loss


_CURVES = (
    Curve("rewards/margin", "Reward margin", "demonstration minus sample", "Implicit reward"),
    Curve(
        "rewards/accuracy",
        "Reward accuracy",
        "share of pairs with a positive margin; a tie counts half",
        "Implicit reward",
    ),
    Curve(
        "rewards/demonstrations",
        "Reward of demonstrations",
        "β log π/π_ref; faint: of samples",
        "Implicit reward",
        faint="rewards/samples",
    ),
    Curve("pairs/dropped", "Dropped pairs", "sample equal to its demonstration", "Samples"),
)


def _card(record: RunRecord) -> str:
    """How many stages there were, and what each did."""
    stages = sum("pairs/dropped" in row for row in record.history)
    return (
        f"The data are demonstrations alone. {stages} stages: at the start of each, "
        f"{record.settings.get('num_samples')} completion(s) per prompt were sampled from the policy as it stood, and the "
        "steps of the stage made the demonstrations more likely relative to them (Li et al. 2024, arXiv 2405.17888)."
    )


IRFT = AlgorithmInfo(
    "irft", "contrast demonstrations with the policy's own samples, stage by stage", "irft.md", _card, _CURVES
)


class IRFTTrainer(DemonstrationTrainer):
    """Trains on ``IRFTObjective`` with samples drawn from π_t, the policy where the stage began, stage by stage.

    Args:
        sampler: draws the samples; by default from the model in memory.
        others: see ``DemonstrationTrainer``.
    """

    args: IRFTConfig

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: IRFTConfig,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        *,
        sampler: Sampler | None = None,
        progress: Progress | None = None,
        source: str = "training data",
        eval_source: str = "held-out data",
    ):
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
            info=IRFT,
            objective=IRFTObjective.of(args),
        )
        contrast_in_stages(self, args, sampler)


def contrast_in_stages(trainer: DemonstrationTrainer, args: IRFTConfig, sampler: Sampler | None) -> None:
    """Hand in the stages of IRFT.

    Args:
        sampler: draws the samples; None for the model in memory.
    """
    store = make_store(trainer)
    rollout = make_rollout(trainer, sampler, reference_is_initial=args.reference == "initial")
    # With the SFT term a demonstration teaches something without a sample beside it too.
    learnable = without_copies if args.sft_weight else pairs
    phase = Replay(rollout, store, learnable, stages=args.replay_stages)
    trainer.train_in_stages(make_stages(trainer, rollout, store, phase))


ALGORITHM = Algorithm(IRFT, IRFTConfig, IRFTTrainer)
