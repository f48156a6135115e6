"""Sets of features by name: what a feature reward is made of."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import numpy as np

from tutelage.errors import UserError
from tutelage.groups import Group
from tutelage.rewards.base import own_logps
from tutelage.rewards.hidden_features import HiddenFeatures, HiddenSource
from tutelage.rewards.text_features import TextFeatures
from tutelage.rewards.vocabulary import Feature, Vocabulary

__all__ = ["FeatureParts", "FeatureSet", "FunctionFeatures", "LogpFeatures", "feature_set", "feature_sets"]

_FIELD = "reward_features"


class FeatureSet(Protocol):
    """Numbers of a completion given its prompt, and their names.

    Attributes:
        name: as the user writes it.
        learned: whether weights are learned; else the set has one feature, of a fixed positive weight.
        compares_across_prompts: whether its features mean the same at every prompt.
    """

    @property
    def name(self) -> str: ...

    @property
    def learned(self) -> bool: ...

    @property
    def compares_across_prompts(self) -> bool: ...

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

    def readable(self, column: int, text: Callable[[Sequence[int]], str] | None = None) -> str:
        """A feature as people read it; ``text`` decodes token ids."""
        ...

    def settings(self) -> dict[str, Any]:
        """What makes the set again, as JSON; ``feature_set`` reads it."""
        ...


@dataclass(frozen=True)
class FeatureParts:
    """What sets need besides tokens; each is asked for by the sets that need it alone.

    Attributes:
        text: decodes token ids, for ``module:function``.
        hidden: for ``hidden``; rewards that share it compute the states of a completion once.
        logps: log-probs of the tokens of each completion of groups under the policy (nats per token), for ``logp``, where
            completions do not know their ``old_logps``. ``cached_token_logps`` of a model gives them.
        settings: of sets by name, where they are made anew: ``{"hidden": {"depths": (1.0,), "pooling": "last"}}``.
    """

    text: Callable[[Sequence[int]], str] | None = None
    hidden: HiddenSource | None = None
    logps: Callable[[Sequence[Group]], Sequence[Sequence[Sequence[float]]]] | None = None
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


class LogpFeatures:
    """The set ``logp``: the policy's log-prob of an answer (nats per sequence), with a fixed positive weight.

    The weight is not learned: demonstrations that a policy has not trained on are less probable under it than its own
    samples, and a fit would learn that improbable is good.

    Args:
        logps: as in ``FeatureParts``.
    """

    name = "logp"
    learned = False
    compares_across_prompts = False
    width = 1

    def __init__(self, logps: Callable[[Sequence[Group]], Sequence[Sequence[Sequence[float]]]] | None = None):
        self.logps = logps

    def choose(self, groups: Sequence[Group]) -> np.ndarray:
        """As ``matrix``."""
        return self.matrix(groups)

    def matrix(self, groups: Sequence[Group]) -> np.ndarray:
        """[C, 1] log-probs.

        Raises:
            UserError: some completion does not know its ``old_logps``, and no ``logps`` was given.
        """
        sums = own_logps(groups, self.logps or _no_policy)
        return np.array(sums, dtype=np.float64).reshape(-1, 1)

    def readable(self, column: int, text: Callable[[Sequence[int]], str] | None = None) -> str:
        """What it is."""
        return "log-prob of the policy"

    def settings(self) -> dict[str, Any]:
        """Nothing."""
        return {}


def _no_policy(groups: Sequence[Group]) -> Sequence[Sequence[Sequence[float]]]:
    raise UserError(
        "the features 'logp' need the policy, to find log-probs of completions that were not sampled in this run.",
        remedy="Give the policy (--logp_model).",
        field="logp_model",
    )


class FunctionFeatures:
    """The set ``module:function``: features that a function of the user finds in texts.

    ``f(prompt: str, completion: str) -> Mapping[str, float]``: named numbers; one that is not named is 0. If they mean
    something within a prompt alone, set ``f.compares_across_prompts = False``.

    Args:
        name: of the function.
        text: decodes token ids, special tokens left out.
        names: of an earlier fit.

    Raises:
        UserError: there is no such function.
    """

    learned = True

    def __init__(
        self,
        name: str,
        text: Callable[[Sequence[int]], str] | None,
        *,
        limit: int = 4096,
        names: Sequence[Sequence[str | int]] = (),
    ):
        self.name, self.text, self.limit = name, text, limit
        self.function = _imported(name)
        self.compares_across_prompts = bool(getattr(self.function, "compares_across_prompts", True))
        self.vocabulary = Vocabulary(names)

    @property
    def width(self) -> int:
        """F."""
        return len(self.vocabulary)

    def choose(self, groups: Sequence[Group]) -> Any:
        """Take the names that the function gives; returns their values."""
        rows = self._rows(groups)
        self.vocabulary = Vocabulary.of(groups, rows, limit=self.limit, least=1)
        return self.vocabulary.matrix(rows)

    def matrix(self, groups: Sequence[Group]) -> Any:
        """[C, F] values.

        Raises:
            UserError: the function failed, or gave something else than finite numbers by name.
        """
        return self.vocabulary.matrix(self._rows(groups))

    def _rows(self, groups: Sequence[Group]) -> list[dict[Feature, float]]:
        text = self.text
        if text is None:
            raise UserError(
                f"the features '{self.name}' need the tokenizer.", remedy="Give it as FeatureParts.text.", field=_FIELD
            )
        return [
            self._row(text(group.prompt_ids), text(completion.token_ids), group.row)
            for group in groups
            for completion in group.completions
        ]

    def _row(self, prompt: str, completion: str, row: int) -> dict[Feature, float]:
        try:
            found = {(str(name),): float(value) for name, value in self.function(prompt, completion).items()}
            if wrong := [name for (name,), value in found.items() if not math.isfinite(value)]:
                raise ValueError(f"'{wrong[0]}' is NaN or infinite")
        except Exception as error:  # it is the user's function: whatever it raises is told
            raise UserError(
                f"the features '{self.name}' fail: {type(error).__name__}: {error}.",
                remedy="The function takes two texts, prompt and completion, and returns finite numbers by name.",
                row=row + 1 if row >= 0 else None,
                field=_FIELD,
            ) from error
        return found  # type: ignore[return-value]

    def readable(self, column: int, text: Callable[[Sequence[int]], str] | None = None) -> str:
        """The name that the function gave."""
        return str(self.vocabulary.names[column][0])

    def settings(self) -> dict[str, Any]:
        """What makes this set again; JSON."""
        return {"limit": self.limit, "names": [list(name) for name in self.vocabulary.names]}


def feature_sets(names: str, parts: FeatureParts | None = None) -> list[FeatureSet]:
    """The sets that a list of names stands for.

    Args:
        names: ``text``, ``hidden``, ``logp`` and ``module:function``, separated by commas. ``logp`` alone is
            self-training, the control of every reward.

    Raises:
        UserError: no such set, or one named twice.
    """
    listed = [name.strip() for name in names.split(",") if name.strip()]
    if not listed or len(set(listed)) < len(listed):
        raise UserError(
            f"'{names}' names {'a set twice' if listed else 'no set'}.",
            remedy="Write for example text,hidden.",
            field=_FIELD,
        )
    parts = parts or FeatureParts()
    return [feature_set({"name": name, **parts.settings.get(name, {})}, parts) for name in listed]


def feature_set(settings: Mapping[str, Any], parts: FeatureParts) -> FeatureSet:
    """A set of its name and what else ``FeatureSet.settings`` gave.

    Raises:
        UserError: no such set, a part is missing, or its function cannot be imported.
    """
    name, options = settings["name"], {key: value for key, value in settings.items() if key != "name"}
    if name == "text":
        return TextFeatures(**options)
    if name == "hidden":
        if parts.hidden is None:
            raise UserError(
                "the features 'hidden' need the base model.", remedy="Give it (--base_model).", field="base_model"
            )
        return HiddenFeatures(parts.hidden, **options)
    if name == "logp":
        return LogpFeatures(parts.logps)
    if ":" in name:
        return FunctionFeatures(name, parts.text, **options)
    raise UserError(
        f"'{name}' is not a set of features.",
        remedy="Write text, hidden, logp or module:function, separated by commas.",
        field=_FIELD,
    )


def _imported(name: str) -> Callable[[str, str], Mapping[str, float]]:
    module, _, attribute = name.partition(":")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # whatever the module does when it is imported
        raise UserError(
            f"the features '{name}' cannot be imported: {type(error).__name__}: {error}.",
            remedy="Put the module on PYTHONPATH and check the function's name.",
            field=_FIELD,
        ) from error
    if not callable(function):
        raise UserError(
            f"'{name}' is not a function.", remedy="Name a function of (prompt, completion).", field=_FIELD
        )
    return cast(Callable[[str, str], Mapping[str, float]], function)
