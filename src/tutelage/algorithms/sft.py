"""SFT: maximum likelihood of the demonstrations. The baseline and, continued, the control of every comparison."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from tutelage.algorithms.registry import Algorithm
from tutelage.groups import Group, Role
from tutelage.losses import dft_loss, sft_loss
from tutelage.progress import Progress
from tutelage.results import AlgorithmInfo
from tutelage.scoring.logps import TokenLogps
from tutelage.training.config import SFT_LEARNING_RATES, DemonstrationConfig
from tutelage.training.objective import Step
from tutelage.training.trainer import DemonstrationTrainer

__all__ = ["ALGORITHM", "SFTConfig", "SFTTrainer"]

SFT = AlgorithmInfo("sft", "maximum likelihood of the demonstrations", "sft.md")


@dataclass
class SFTConfig(DemonstrationConfig):
    """Settings of SFT."""

    adapter_learning_rate: ClassVar[float] = SFT_LEARNING_RATES["adapter"]
    full_learning_rate: ClassVar[float] = SFT_LEARNING_RATES["full"]

    loss_kind: str = field(
        default="nll",
        metadata={
            "help": "Loss per token: nll (negative log-likelihood), or dft (weighted by the token's probability, arXiv "
            "2508.05629).",
            "choices": ["nll", "dft"],
        },
    )


class SFTObjective:
    """A loss per token of the demonstrations, averaged over the completion tokens of an optimizer step.

    Args:
        token_loss: from [N] log-probs (nats per token) to [N] losses.
    """

    uses_dropout = True

    def __init__(self, token_loss: Callable[[Tensor], Tensor] = sft_loss):
        self.token_loss = token_loss

    def beta(self, stage: int) -> float:
        """SFT has no temperature: the unit is one nat."""
        return 1.0

    def counts(self, groups: Sequence[Group]) -> dict[str, int]:
        """Demonstration tokens."""
        return {"tokens": sum(len(c.token_ids) for group in groups for c in group.demonstrations)}

    def loss(self, tokens: TokenLogps, step: Step) -> Tensor:
        """The mean loss per token."""
        step.track("logps/demonstrations", tokens.sums_of(Role.DEMONSTRATION))
        return self.token_loss(tokens.logps_of(Role.DEMONSTRATION)).sum() / max(1, step.counts["tokens"])


TOKEN_LOSSES = {"nll": sft_loss, "dft": dft_loss}


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
            objective=SFTObjective(TOKEN_LOSSES[args.loss_kind]),
        )


ALGORITHM = Algorithm(SFT, SFTConfig, SFTTrainer)
