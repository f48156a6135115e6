"""Hidden states of a frozen model as features of answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn

from tutelage.errors import UserError
from tutelage.groups import Completion, Group, Role
from tutelage.models.loading import base_causal_lm
from tutelage.scoring.hidden import CompletionStates, completion_hidden_states, layers_at_depths
from tutelage.scoring.logps import Layout, in_batches

__all__ = ["HiddenFeatures", "HiddenSource", "Pooling"]

Pooling = Literal["mean", "last"]

_CACHED = 2**28  # bytes
_PROBED = 32  # numbers of an answer's states that tell whether a model is the one that weights were learned on


@dataclass
class HiddenSource:
    """A frozen model, and the states it gave: computed once for a completion, for all rewards that share the source.

    Attributes:
        model: gives the model, at the first use; of a model with an adapter, the base alone runs. Its weights must not
            change.
        layout, batch_size, pad_token_id: as for ``cached_token_logps``.
        autocast: makes a context for mixed precision.
    """

    model: Callable[[], nn.Module]
    layout: Layout = "auto"
    batch_size: int = 16
    pad_token_id: int = 0
    autocast: Any = nullcontext
    _cache: dict[tuple[Any, ...], np.ndarray] = field(default_factory=dict, repr=False)

    def states(self, groups: Sequence[Group], depths: Sequence[float], pooling: Pooling) -> np.ndarray:
        """[C, layers · H] float32 states of completions, one layer after the other."""

        def key(group: Group, completion: Completion) -> tuple[Any, ...]:
            return group.prompt_ids, completion.token_ids, tuple(depths), pooling

        missing = [
            group.select(places)
            for group in groups
            if (places := [i for i, c in enumerate(group.completions) if key(group, c) not in self._cache])
        ]
        fresh = {
            key(group, completion): row
            for group, rows in zip(missing, self._computed(missing, depths, pooling), strict=True)
            for completion, row in zip(group.completions, rows, strict=True)
        }
        found = [
            fresh[name] if (name := key(group, completion)) in fresh else self._cache[name]
            for group in groups
            for completion in group.completions
        ]
        self._keep(fresh)
        return np.stack(found) if found else np.zeros((0, 0), dtype=np.float32)

    def _computed(self, groups: Sequence[Group], depths: Sequence[float], pooling: Pooling) -> list[np.ndarray]:
        if not groups:
            return []
        model = self.model()

        def of_batch(batch: Sequence[Group]) -> list[np.ndarray]:
            states = completion_hidden_states(
                model,
                batch,
                layers=layers_at_depths(model, depths),
                layout=self.layout,
                pad_token_id=self.pad_token_id,
            )
            pooled_SCH = states.means() if pooling == "mean" else _last(states)
            rows = iter(pooled_SCH.transpose(0, 1).flatten(1).float().cpu().numpy())
            return [np.stack([next(rows) for _ in group.completions]) for group in batch]

        with model.disable_adapter() if isinstance(model, PeftModel) else nullcontext(), self.autocast():
            return in_batches(of_batch, model, groups, batch_size=self.batch_size)

    def _keep(self, fresh: dict[tuple[Any, ...], np.ndarray]) -> None:
        self._cache |= fresh
        width = next(iter(self._cache.values())).nbytes if self._cache else 1
        for name in list(self._cache)[: max(0, len(self._cache) - _CACHED // width)]:  # the oldest
            del self._cache[name]

    def name(self) -> str | None:
        """What transformers loads the model from, if that is known."""
        return base_causal_lm(self.model()).name_or_path or None


def _last(states: CompletionStates) -> Tensor:
    """[layers, C, H] at the last token of each completion."""
    ends_C = torch.bincount(states.completion_ids, minlength=states.num_completions).cumsum(0) - 1
    return states.states[:, ends_C.to(states.states.device)].float()


class HiddenFeatures:
    """The set ``hidden``: states of the frozen base at some depths, pooled over an answer's tokens.

    They compare answers to one prompt: the prompt moves them more than the answer does.

    Args:
        source: of the states.
        depths: fractions of the model's depth: 0 is the embedding, 1 the output of the body.
        pooling: ``mean`` over the tokens, or the ``last`` token's.
        probe: an answer and some of its states at the fit; a model that gives others is refused.
        width: F, of an earlier fit.
    """

    name = "hidden"
    learned = True
    compares_across_prompts = False

    def __init__(
        self,
        source: HiddenSource,
        *,
        depths: Sequence[float] = (1 / 3, 1 / 2, 2 / 3),
        pooling: Pooling = "mean",
        probe: dict[str, Any] | None = None,
        width: int = 0,
    ):
        self.source, self.depths = source, tuple(depths)
        self.pooling: Pooling = pooling
        self.probe, self.width = probe, width
        self._is_checked = probe is None

    def choose(self, groups: Sequence[Group]) -> np.ndarray:
        """[C, F] features."""
        found = self._states(groups)
        self.width = found.shape[1]
        shortest = min((group for group in groups if group.completions), key=len)
        place = min(range(len(shortest.completions)), key=lambda i: len(shortest.completions[i].token_ids))
        values = self._states([shortest.select([place])])[0, :_PROBED]
        self.probe = {
            "prompt_ids": shortest.prompt_ids,
            "token_ids": shortest.completions[place].token_ids,
            "role": str(shortest.completions[place].role),
            "finished": shortest.completions[place].finished,
            "values": [round(float(value), 6) for value in values],
        }
        self._is_checked = True
        return found

    def matrix(self, groups: Sequence[Group]) -> np.ndarray:
        """[C, F] features.

        Raises:
            UserError: the model is not the one that weights were learned on.
        """
        if not self._is_checked:
            self._check()
        return self._states(groups)

    def _states(self, groups: Sequence[Group]) -> np.ndarray:
        return self.source.states(groups, self.depths, self.pooling).astype(np.float64)

    def _check(self) -> None:
        probe = self.probe or {}
        completion = Completion(tuple(probe["token_ids"]), Role(probe["role"]), probe["finished"])
        found = self._states([Group(tuple(probe["prompt_ids"]), (completion,))])[0]
        then = np.array(probe["values"])
        # A precision other than the fit's changes states by about a hundredth.
        same = len(found) == self.width and np.linalg.norm(found[: len(then)] - then) <= 0.1 * np.linalg.norm(then)
        if not same:
            raise UserError(
                f"the model {self.source.name() or 'given'} has other hidden states than the one the reward was learned on.",
                remedy="Give the base model that the reward was learned on.",
                field="base_model",
            )
        self._is_checked = True

    def readable(self, column: int, text: Callable[[Sequence[int]], str] | None = None) -> str:
        """Which depth; single units mean nothing to a reader."""
        return f"hidden states at depth {self.depths[column // max(1, self.width // len(self.depths))]:.2f}"

    def settings(self) -> dict[str, Any]:
        """What makes this set again on the same model; JSON."""
        return {"depths": list(self.depths), "pooling": self.pooling, "probe": self.probe, "width": self.width}
