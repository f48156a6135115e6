"""Sets of features by name: what a feature reward is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from tutelage.errors import UserError
from tutelage.groups import Group
from tutelage.rewards.text_features import TextFeatures

__all__ = ["FeatureParts", "FeatureSet", "feature_set", "feature_sets"]


class FeatureSet(Protocol):
    """Numbers of a completion given its prompt, and their names.

    Attributes:
        name: as the user writes it.
        learned: whether weights are learned; else the set has one feature of weight 1.
        compares_across_prompts: whether its features mean the same at every prompt.
        scaling: of ``fit_linear``.
    """

    name: str
    learned: bool
    compares_across_prompts: bool
    scaling: float

    @property
    def width(self) -> int:
        """F, the number of features."""
        ...

    def choose(self, groups: Sequence[Group]) -> Any:
        """Decide by completions to learn from which features there are; returns their ``matrix``."""
        ...

    def matrix(self, groups: Sequence[Group]) -> Any:
        """[C, F] features, a NumPy array or a sparse one; groups in order and completions in order within each."""
        ...

    def readable(self, column: int) -> str:
        """A feature as people read it."""
        ...

    def settings(self) -> dict[str, Any]:
        """What makes the set again, as JSON; ``feature_set`` reads it."""
        ...


@dataclass(frozen=True)
class FeatureParts:
    """What sets need besides tokens; each is asked for by the sets that need it alone.

    Attributes:
        text: decodes token ids; for ``module:function``, and to explain.
        base: gives the frozen base model, or a model with an adapter to be switched off; for ``hidden``.
        logps: log-probs of the tokens of each completion of groups under the policy (nats per token); for ``logp``, where
            completions do not know their ``old_logps``. ``cached_token_logps`` of a model gives them.
        layout, batch_size, pad_token_id: of forward passes, as for ``cached_token_logps``.
        autocast: makes a context for mixed precision.
    """

    text: Callable[[Sequence[int]], str] | None = None
    base: Callable[[], nn.Module] | None = None
    logps: Callable[[Sequence[Group]], Sequence[Sequence[Sequence[float]]]] | None = None
    layout: Any = "auto"
    batch_size: int = 16
    pad_token_id: int = 0
    autocast: Any = nullcontext


def feature_sets(names: str, parts: FeatureParts | None = None) -> list[FeatureSet]:
    """The sets that a list of names stands for.

    Args:
        names: ``text``, ``hidden``, ``logp`` and ``module:function``, separated by commas.

    Raises:
        UserError: no such set, or one named twice.
    """
    listed = [name.strip() for name in names.split(",") if name.strip()]
    if not listed or len(set(listed)) < len(listed):
        raise UserError(
            f"'{names}' names {'a set twice' if listed else 'no set'}.",
            remedy="Write for example text,hidden.",
            field="reward_features",
        )
    return [feature_set({"name": name}, parts or FeatureParts()) for name in listed]


def feature_set(settings: Mapping[str, Any], parts: FeatureParts) -> FeatureSet:
    """A set of its name and what else ``FeatureSet.settings`` gave.

    Raises:
        UserError: no such set, or its function cannot be imported.
    """
    name, options = settings["name"], {key: value for key, value in settings.items() if key != "name"}
    if name == "text":
        return TextFeatures(parts.text, **options)
    raise UserError(
        f"'{name}' is not a set of features.",
        remedy="Write text, hidden, logp or module:function, separated by commas.",
        field="reward_features",
    )
