"""SFT: maximum likelihood of the demonstrations. The baseline, and as continued SFT the control of every claim."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tutelage.groups import Group
from tutelage.losses import sft_loss
from tutelage.training.config import DemonstrationConfig
from tutelage.training.trainer import DemonstrationTrainer

__all__ = ["SFTConfig", "SFTTrainer"]


@dataclass
class SFTConfig(DemonstrationConfig):
    """Settings of SFT."""

    adapter_learning_rate: ClassVar[float] = 2e-4
    full_learning_rate: ClassVar[float] = 2e-5


class SFTTrainer(DemonstrationTrainer):
    """Minimizes −log π(y|x) of the demonstrations, averaged over the completion tokens of an optimizer step."""

    algorithm: ClassVar[str] = "sft"

    def counts(self, groups: Sequence[Group]) -> dict[str, int]:
        """Completion tokens."""
        return {"tokens": sum(len(group.completions[0].token_ids) for group in groups)}

    def loss(self, groups: Sequence[Group], logps_C: Tensor, counts: dict[str, int]) -> Tensor:
        """The usual SFT loss, in nats per token."""
        self.track("logps/demonstrations", logps_C)
        return sft_loss(logps_C).sum() / counts["tokens"]
