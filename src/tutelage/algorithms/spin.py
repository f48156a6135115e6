"""SPIN (Chen et al. 2024, arXiv 2401.01335): IRFT with one stage per epoch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from tutelage.algorithms.irft import IRFTConfig, IRFTTrainer
from tutelage.errors import UserError

__all__ = ["SPINConfig", "SPINTrainer"]


@dataclass
class SPINConfig(IRFTConfig):
    """Settings of SPIN: those of IRFT with the number of stages fixed at one per epoch."""

    stages_per_epoch: int = field(default=1, metadata={"help": "Always 1: with more stages the method is IRFT."})

    def __post_init__(self):
        if self.stages_per_epoch != 1:
            raise UserError(
                f"SPIN has 1 stage per epoch, not {self.stages_per_epoch}.",
                remedy="Use irft for more.",
                field="stages_per_epoch",
            )
        super().__post_init__()


class SPINTrainer(IRFTTrainer):
    """IRFT with T = 1: the opponent of a whole epoch is the policy at its start."""

    algorithm: ClassVar[str] = "spin"
