"""The algorithms by name. A page of its own module, found when it is asked for: torch takes seconds to import."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from tutelage.errors import UserError

if TYPE_CHECKING:
    from tutelage.results import AlgorithmInfo
    from tutelage.training.config import DemonstrationConfig

__all__ = ["NAMES", "Algorithm", "find"]

NAMES = ("sft", "spin", "irft", "rft", "sdft")
"""Each is the name of a module beside this one, which has an ``ALGORITHM``."""


@dataclass(frozen=True, slots=True)
class Algorithm:
    """What the command line, the reports and the quickstart need to know of an algorithm.

    Attributes:
        info: name, summary, page, model card, curves.
        config: its settings, a dataclass on ``DemonstrationConfig``.
        trainer: takes a model, the settings and data; see ``DemonstrationTrainer``.
    """

    info: AlgorithmInfo
    config: type[DemonstrationConfig]
    trainer: Any  # each has a signature of its own


def find(name: str) -> Algorithm:
    """The algorithm of a name.

    Raises:
        UserError: there is none.
    """
    if name not in NAMES:
        raise UserError(f"there is no algorithm '{name}'.", remedy=f"Algorithms: {', '.join(NAMES)}.")
    return import_module(f"tutelage.algorithms.{name}").ALGORITHM
