"""SPIN (Chen et al. 2024, arXiv 2401.01335): IRFT with one stage per epoch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from tutelage.algorithms.irft import IRFT, IRFTConfig, IRFTObjective, contrast_in_stages
from tutelage.algorithms.registry import Algorithm
from tutelage.errors import UserError
from tutelage.progress import Progress
from tutelage.ranges import whole
from tutelage.sampling import Sampler
from tutelage.training.trainer import DemonstrationTrainer

__all__ = ["ALGORITHM", "SPINConfig", "SPINTrainer"]

SPIN = replace(IRFT, name="spin", summary="IRFT with one stage per epoch", page="spin.md")


@dataclass
class SPINConfig(IRFTConfig):
    """Settings of SPIN: those of IRFT with the number of stages fixed at one per epoch."""

    stages_per_epoch: Annotated[int, whole(1)] = field(
        default=1, metadata={"help": "Always 1. With more stages the method is IRFT."}
    )

    def __post_init__(self):
        if self.stages_per_epoch != 1:
            raise UserError(
                f"SPIN has 1 stage per epoch, not {self.stages_per_epoch}.",
                remedy="Use irft for more stages.",
                field="stages_per_epoch",
            )
        super().__post_init__()


class SPINTrainer(DemonstrationTrainer):
    """IRFT with T = 1: all samples of an epoch come from the policy at its start.

    Args: see ``IRFTTrainer``.
    """

    args: SPINConfig

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: SPINConfig,
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
            info=SPIN,
            objective=IRFTObjective.of(args),
        )
        contrast_in_stages(self, args, sampler)


ALGORITHM = Algorithm(SPIN, SPINConfig, SPINTrainer)
