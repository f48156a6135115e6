"""The algorithms, a page each."""

from tutelage.algorithms.irft import IRFTConfig, IRFTTrainer
from tutelage.algorithms.rft import RFTConfig, RFTTrainer
from tutelage.algorithms.sft import SFTConfig, SFTTrainer
from tutelage.algorithms.spin import SPINConfig, SPINTrainer

__all__ = [
    "IRFTConfig",
    "IRFTTrainer",
    "RFTConfig",
    "RFTTrainer",
    "SFTConfig",
    "SFTTrainer",
    "SPINConfig",
    "SPINTrainer",
]
