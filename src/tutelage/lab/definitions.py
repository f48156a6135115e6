"""What a run is. Its name is a hash of its definition; the code that it ran with is told by its result (``code.py``)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from tutelage.lab.base import BaseModel
from tutelage.lab.worlds import Phase, WorldOptions

__all__ = ["Run"]

_FORMAT = 1  # raised where the same definition would give other numbers


@dataclass(frozen=True)
class Run:
    """An algorithm with its settings in a world.

    Attributes:
        world, options, seed, phase: see ``World``.
        algorithm: its name in the registry.
        settings: of its config, on top of the lab's own.
        start: the run whose policy it starts from; None for the base model.
        takes_prompts: the prompts without demonstrations are handed to the trainer.
        base: the model that everything starts from.
    """

    world: str
    options: WorldOptions
    seed: int
    phase: Phase
    algorithm: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    start: Run | None = None
    takes_prompts: bool = False
    base: BaseModel = field(default_factory=BaseModel)

    @property
    def definition(self) -> dict[str, Any]:
        """All of it as JSON values; the start as its name."""
        return {
            "format": _FORMAT,
            "world": self.world,
            "options": asdict(self.options),
            "seed": self.seed,
            "phase": self.phase,
            "algorithm": self.algorithm,
            "settings": dict(self.settings),
            "start": None if self.start is None else self.start.name,
            "takes_prompts": self.takes_prompts,
            "base": self.base.key,
        }

    @cached_property  # a plan asks for it many times
    def name(self) -> str:
        """Equal runs have equal names."""
        text = json.dumps(self.definition, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()[:20]
