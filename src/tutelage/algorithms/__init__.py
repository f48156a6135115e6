"""The algorithms, a page each; ``registry`` finds one by its name."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tutelage.algorithms.irft import IRFTConfig, IRFTTrainer
    from tutelage.algorithms.rft import RFTConfig, RFTTrainer
    from tutelage.algorithms.sdft import SDFTConfig, SDFTTrainer
    from tutelage.algorithms.sft import SFTConfig, SFTTrainer
    from tutelage.algorithms.spin import SPINConfig, SPINTrainer

__all__ = [
    "IRFTConfig",
    "IRFTTrainer",
    "RFTConfig",
    "RFTTrainer",
    "SDFTConfig",
    "SDFTTrainer",
    "SFTConfig",
    "SFTTrainer",
    "SPINConfig",
    "SPINTrainer",
]


def __getattr__(name: str) -> Any:  # a page imports torch and transformers, which the registry's names do not need
    if name in __all__:
        page = name.removesuffix("Config").removesuffix("Trainer").lower()
        return getattr(import_module(f"tutelage.algorithms.{page}"), name)
    raise AttributeError(f"module 'tutelage.algorithms' has no attribute {name!r}")
