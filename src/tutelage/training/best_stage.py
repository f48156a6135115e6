"""The policy that does best on held-out rows, of those with which the stages of a run begin and of the last one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from tutelage.models.sharding import gathered
from tutelage.models.weights import load_weights, save_weights
from tutelage.training.store import StageStore

__all__ = ["BEST_FILES", "BestStage"]

_FACTS, _WEIGHTS = "best.json", "best.safetensors"
BEST_FILES = (_FACTS, _WEIGHTS)
"""What lies in the folder of a stage whose first policy was the best so far."""


class BestStage:
    """Keeps the weights of the best policy so far beside the stages, and restores them at the end.

    The weights of one that a better one followed stay as long as a checkpoint lies between the two: a run that goes back
    decides as the first one did.

    Args:
        store: the run's stages.
        policy: whose trained weights are kept.
        measure: value of the policy as it stands on the held-out rows; higher is better.
        metric: what that is.
    """

    def __init__(self, store: StageStore, policy: nn.Module, measure: Callable[[], float], metric: str):
        self.store, self.policy, self.measure, self.metric = store, policy, measure, metric
        self.chosen: dict[str, Any] = {}
        self._seen: dict[int, float] = {}

    def look(self, stages: int) -> None:
        """Measure the policy that so many stages made, and keep its weights if it is the best so far."""
        value = self._value(stages)
        best = self._best_before(stages)
        for name in BEST_FILES:
            self.store.forget(stages, name)
        if best is None or value > self._facts(best)["value"]:
            weights = list(gathered({str(i): p for i, p in enumerate(self._weights)}).values())
            self.store.write_with(stages, _WEIGHTS, lambda path: save_weights(weights, path))
            self.store.write_facts(stages, _FACTS, {"stages": stages, "metric": self.metric, "value": value})

    def choose(self, stages: int, *, collapsed: bool = False) -> None:
        """Set the policy, which so many stages made, to the best one.

        Args:
            collapsed: it is none to choose.

        Raises:
            DamagedFileError: the best one's weights are not as they were written.
        """
        last = self._value(stages)
        best = self._best_before(stages)
        chosen = {"stages": stages, "metric": self.metric, "value": last}
        if best is not None and (collapsed or self._facts(best)["value"] >= last):
            chosen = self._facts(best)
            load_weights(self._weights, self.store.file(best, _WEIGHTS))
        self.chosen = {**chosen, "last_stages": stages, "last_value": last, "collapsed": collapsed}

    def needed(self, upcoming: int, newest: int) -> Sequence[int]:
        """The stages whose files are read by a run that goes on at stage ``upcoming`` or a later one up to ``newest``."""
        best = self._best_before(upcoming)
        return [stage for stage in range(best or 0, newest + 2) if self.store.has(stage, _FACTS)]

    def tidy(self, upcoming: int, newest: int) -> None:
        """Remove the weights of those that no run which goes on at stage ``upcoming`` or later can choose."""
        needed = self.needed(upcoming, newest)
        for stage in range(newest + 1):
            if stage not in needed:
                for name in BEST_FILES:
                    self.store.forget(stage, name)

    def _value(self, stages: int) -> float:
        if stages not in self._seen:
            value = self.measure()
            self._seen = {stages: value if math.isfinite(value) else -1e308}  # JSON has no infinity
        return self._seen[stages]

    def _best_before(self, stages: int) -> int | None:
        """The last stage before that was the best so far, which each of them is by more than the ones before it."""
        found = (s for s in range(stages - 1, -1, -1) if all(self.store.has(s, name) for name in BEST_FILES))
        return next(found, None)

    def _facts(self, stage: int) -> dict[str, Any]:
        return self.store.facts(stage, _FACTS)

    @property
    def _weights(self) -> list[nn.Parameter]:
        return [p for p in self.policy.parameters() if p.requires_grad]
