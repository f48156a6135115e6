"""SFT: maximum likelihood of the demonstrations. The baseline and, continued, the control of every comparison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from tutelage.algorithms.registry import Algorithm
from tutelage.algorithms.sft_losses import CURVES, LOSS_KINDS, LossKind
from tutelage.errors import UserError
from tutelage.groups import Group, Role
from tutelage.progress import Progress
from tutelage.ranges import number, whole
from tutelage.results import AlgorithmInfo
from tutelage.scoring.logps import TokenLogps
from tutelage.training.config import SFT_LEARNING_RATES, DemonstrationConfig
from tutelage.training.objective import Step
from tutelage.training.trainer import DemonstrationTrainer

__all__ = ["ALGORITHM", "SFTConfig", "SFTTrainer"]

SFT = AlgorithmInfo("sft", "maximum likelihood of the demonstrations", "sft.md", curves=CURVES)


@dataclass
class SFTConfig(DemonstrationConfig):
    """Settings of SFT."""

    adapter_learning_rate: ClassVar[float] = SFT_LEARNING_RATES["adapter"]
    full_learning_rate: ClassVar[float] = SFT_LEARNING_RATES["full"]

    loss_kind: str = field(
        default="nll",
        metadata={
            "help": (
                "Loss: nll (negative log-likelihood); dft (tokens weighted by their probability, arXiv 2508.05629); asft (dft "
                "anchored to the start, arXiv 2509.23753); psft (clipped ratios, arXiv 2508.17784); iw (demonstrations "
                "weighted by importance, arXiv 2507.12856). docs/sft.md has the equations."
            ),
            "choices": [*LOSS_KINDS],
        },
    )
    anchor_weight: Annotated[float | None, number(0)] = field(
        default=None, metadata={"help": "λ of asft: weight of the KL between policy and start; 0.1 by default."}
    )
    anchor_kl: str | None = field(
        default=None,
        metadata={
            "help": "Of asft: forward for KL(start ‖ policy), as in the authors' code, or reverse for KL(policy ‖ start); "
            "forward by default.",
            "choices": ["forward", "reverse"],
        },
    )
    clip_range: Annotated[float | None, number(0, above=True)] = field(
        default=None,
        metadata={
            "help": "ε of psft: a token whose probability grew by more than a factor of 1 + ε has no gradient; 0.28 by default."
        },
    )
    old_policy_steps: Annotated[int | None, whole(1)] = field(
        default=None,
        metadata={
            "help": "Of psft: optimizer steps for which the old policy stays the same; 8 by default. At 1 it is SFT."
        },
    )
    weight_temperature: Annotated[float | None, number(0)] = field(
        default=None,
        metadata={"help": "τ of iw: exponent of the importance weights; 1 by default. At 0 it is SFT."},
    )
    weight_limit: Annotated[float | None, number(0, above=True)] = field(
        default=None, metadata={"help": "Of iw: the largest importance weight; 16 by default."}
    )

    def __post_init__(self):
        super().__post_init__()
        own = LOSS_KINDS[self.loss_kind].settings
        for kind, found in LOSS_KINDS.items():
            for name in found.settings.keys() - own.keys():
                if getattr(self, name) is not None:
                    raise UserError(
                        f"has no effect with --loss_kind {self.loss_kind}.",
                        remedy=f"Leave it out, or use --loss_kind {kind}.",
                        field=name,
                    )
        for name, default in own.items():
            if getattr(self, name) is None:
                setattr(self, name, default)


class SFTObjective:
    """A loss of the demonstrations, averaged over the completion tokens of an optimizer step.

    Args:
        kind: the loss.
        args: holds the settings that it reads.
    """

    def __init__(self, kind: LossKind, args: SFTConfig):
        self.kind, self.args, self.uses_dropout = kind, args, kind.uses_dropout

    def beta(self, stage: int) -> float:
        """SFT has no temperature: the unit is one nat."""
        return 1.0

    def counts(self, groups: Sequence[Group]) -> dict[str, int]:
        """Demonstration tokens."""
        return {"tokens": sum(len(c.token_ids) for group in groups for c in group.demonstrations)}

    def loss(self, tokens: TokenLogps, step: Step) -> Tensor:
        """The mean loss per token."""
        tokens = tokens.only(Role.DEMONSTRATION)
        step.track("logps/demonstrations", tokens.sums())
        return self.kind.losses(tokens, self.args, step.track).sum() / max(1, step.counts["tokens"])


class SFTTrainer(DemonstrationTrainer):
    """Minimizes −log π(y|x) of the demonstrations, or what ``loss_kind`` puts in its place.

    Args: see ``DemonstrationTrainer``.
    """

    args: SFTConfig

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: SFTConfig,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        *,
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
            info=SFT,
            objective=SFTObjective(LOSS_KINDS[args.loss_kind], args),
        )
        LOSS_KINDS[args.loss_kind].prepare(self, args)


ALGORITHM = Algorithm(SFT, SFTConfig, SFTTrainer)
