"""tutelage: alignment from demonstrations alone."""

import os
import sys

# `python -m tutelage` puts the current folder first, where any json.py would be run in place of the library that is meant. The
# command `tutelage` does not look there; what a user wants imported from there goes on PYTHONPATH.
if sys.argv[:1] == ["-m"] and not sys.flags.safe_path and sys.path[:1] in ([""], [os.getcwd()]):
    del sys.path[0]

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tutelage.algorithms import (
        IRFTConfig,
        IRFTTrainer,
        RFTConfig,
        RFTTrainer,
        SDFTConfig,
        SDFTTrainer,
        SFTConfig,
        SFTTrainer,
        SPINConfig,
        SPINTrainer,
    )
    from tutelage.errors import UserError
    from tutelage.groups import Completion, Group, Role
    from tutelage.rewards import ExplicitReward, ImplicitReward, Reward

__version__ = version("tutelage")

# Imported when asked for: torch and transformers take seconds, and `tutelage --help` should not.
_HOMES = {
    "tutelage.algorithms": [
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
    ],
    "tutelage.errors": ["UserError"],
    "tutelage.groups": ["Completion", "Group", "Role"],
    "tutelage.rewards": ["ExplicitReward", "ImplicitReward", "Reward"],
}

__all__ = [
    "Completion",
    "ExplicitReward",
    "Group",
    "IRFTConfig",
    "IRFTTrainer",
    "ImplicitReward",
    "RFTConfig",
    "RFTTrainer",
    "Reward",
    "Role",
    "SDFTConfig",
    "SDFTTrainer",
    "SFTConfig",
    "SFTTrainer",
    "SPINConfig",
    "SPINTrainer",
    "UserError",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"module 'tutelage' has no attribute {name!r}")
