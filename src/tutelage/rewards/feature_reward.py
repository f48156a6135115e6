"""A reward that is linear in named features: fitted in seconds on a CPU, and its weights can be read."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor

from tutelage.errors import UserError
from tutelage.files import read_json, write_json
from tutelage.groups import Group, Role
from tutelage.models.paths import first_line, run_part
from tutelage.rewards.comparisons import Comparisons, TruncatedSamples
from tutelage.rewards.feature_sets import FeatureParts, FeatureSet, feature_set, feature_sets
from tutelage.rewards.linear import Design, accuracies, compare, fit_linear, spread_within

__all__ = ["FACTS", "FeatureReward", "Spoken"]

FACTS = "feature_reward.json"
_NUMBERS = "feature_reward.safetensors"
_FORMAT = 1


@dataclass(frozen=True)
class Spoken:
    """What one feature says of an answer.

    Attributes:
        set_name: of its set.
        feature: as people read it.
        value: the feature's.
        weight: reward per unit of the feature.
        contribution: value times weight; in units of the set's standard deviation within a prompt.
    """

    set_name: str
    feature: str
    value: float
    weight: float
    contribution: float


@dataclass
class _Term:
    """A set with its weights: the score of a completion is (features · weights − center) / spread."""

    features: FeatureSet
    weights: np.ndarray
    center: float = 0.0
    spread: float = 1.0

    def scores(self, matrix: Any) -> np.ndarray:
        return (matrix @ self.weights - self.center) / self.spread


class FeatureReward:
    """r(x, y) = Σ_s (w_s · φ_s(x, y) − c_s) / σ_s over sets s of features; 0 everywhere until it is fitted.

    σ_s is the standard deviation of the set's scores within a prompt, over samples of the kind on which the reward is judged, and
    c_s their mean: each set counts alike, and the reward is in units of such deviations.

    Args:
        sets: of features; ``feature_sets`` makes them of names.
    """

    def __init__(self, sets: Sequence[FeatureSet]):
        self._terms = [_Term(features, np.zeros(features.width)) for features in sets]
        self.is_fitted = False
        self.facts: dict[str, float] = {}

    @staticmethod
    def of(names: str, parts: FeatureParts | None = None) -> FeatureReward:
        """An unfitted reward on the sets that ``names`` lists, separated by commas; see ``feature_sets``."""
        return FeatureReward(feature_sets(names, parts))

    @property
    def sets(self) -> list[FeatureSet]:
        """The sets of features."""
        return [term.features for term in self._terms]

    @property
    def compares_across_prompts(self) -> bool:
        """Whether scores of answers to different prompts compare: if the features of all sets do."""
        return all(features.compares_across_prompts for features in self.sets)

    # --- scoring --------------------------------------------------------------------------------------------------------

    def score(self, groups: Sequence[Group]) -> Tensor:
        """[C] rewards; see ``Reward``."""
        total = np.zeros(sum(len(group.completions) for group in groups))
        if self.is_fitted and len(total):
            for term in self._terms:
                total += term.scores(term.features.matrix(groups))
        return torch.tensor(total, dtype=torch.float32)

    def scores(self, groups: Sequence[Group]) -> list[tuple[float, ...]]:
        """As ``score``, one tuple per group."""
        rewards = iter(self.score(groups).tolist())
        return [tuple(next(rewards) for _ in group.completions) for group in groups]

    # --- learning -------------------------------------------------------------------------------------------------------

    def fit(
        self,
        comparisons: Comparisons,
        *,
        truncated_samples: TruncatedSamples = "floor",
        seed: int = 0,
        strengths: Mapping[str, float] | None = None,
        cross_validate: bool = True,
    ) -> dict[str, float]:
        """Learn anew from comparisons; what was learned before is forgotten. Equal arguments give equal rewards.

        Each set is fitted by itself (see ``fit_linear``), its strength chosen by cross-validation over prompts.

        Args:
            truncated_samples: as for ``contrast``.
            seed: of folds, of partners for unpaired samples, of projections.
            strengths: of sets by name, C of an earlier fit (``facts["strength/text"]``), so that none is searched.
            cross_validate: find accuracies on held-out prompts also where strengths are given.

        Returns:
            facts for the log: ``pairs``, ``prompts``, ``seconds``; for each learned set ``features/SET``,
            ``strength/SET`` and ``accuracy/SET/KIND``, the share of pairs of held-out prompts that are ranked rightly, by
            kind of negatives (``unpaired`` among them); ``accuracy/KIND`` of the learned sets together; and
            ``judged/KIND`` 1 for the kind on which strengths were chosen. With nothing to compare, ``pairs`` is 0, and
            the reward stays as it was.
        """
        began = time.perf_counter()
        design = compare(comparisons, truncated_samples=truncated_samples, seed=seed)
        facts: dict[str, float] = {"pairs": float(len(design.better)), "prompts": float(len(comparisons.prompts))}
        if not len(design.better):
            self.facts = facts
            return facts
        together = np.zeros(len(design.better))
        for term in self._terms:
            if not term.features.learned:
                _standardize(term, design)
                continue
            name = term.features.name
            margins, found = _learn(term, design, (strengths or {}).get(name), cross_validate, seed)
            facts |= {key.replace("SET", name): value for key, value in found.items()}
            together = None if margins is None or together is None else together + margins
        if together is not None and together.any():
            facts |= {f"accuracy/{kind}": value for kind, value in accuracies(together, design).items()}
        facts[f"judged/{design.judged_kind}"] = 1.0
        facts["seconds"] = time.perf_counter() - began
        self.is_fitted, self.facts = True, facts
        return facts

    # --- reading --------------------------------------------------------------------------------------------------------

    def explain(self, group: Group, place: int, *, top: int = 10) -> list[Spoken]:
        """What spoke for and against an answer: the features with the largest contributions, largest first.

        Where a set's features compare only within a prompt, values are relative to the mean of the group's completions.

        Args:
            place: of the completion among the group's.
        """
        spoken = []
        for term in self._terms if self.is_fitted else ():
            matrix = term.features.matrix([group])
            dense = matrix.toarray() if hasattr(matrix, "toarray") else np.asarray(matrix)
            values = dense[place] if term.features.compares_across_prompts else dense[place] - dense.mean(axis=0)
            weights = term.weights / term.spread
            spoken += [
                Spoken(
                    term.features.name,
                    term.features.readable(int(column)),
                    float(values[column]),
                    float(weights[column]),
                    float(values[column] * weights[column]),
                )
                for column in np.flatnonzero(values * weights)
            ]
        return sorted(spoken, key=lambda said: -abs(said.contribution))[:top]

    # --- on disk --------------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path, tokenizer: Any = None, **facts: Any) -> None:
        """Write ``feature_reward.json`` (names, settings, facts) and ``feature_reward.safetensors`` (weights).

        Args:
            tokenizer: saved beside them, so that ``tutelage score`` can read the folder.
            facts: further entries of the JSON, such as ``max_prompt_length`` or ``base_model``.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        numbers = {str(place): term.weights for place, term in enumerate(self._terms)}
        temporary = folder / f"{_NUMBERS}.tmp"
        save_file(numbers, temporary)
        os.replace(temporary, folder / _NUMBERS)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        content = {
            "format": _FORMAT,
            "is_fitted": self.is_fitted,
            "fit": self.facts,
            "numbers": _digest(folder / _NUMBERS),
            **facts,
            "sets": [
                {
                    "center": term.center,
                    "spread": term.spread,
                    "settings": {"name": term.features.name, **term.features.settings()},
                }
                for term in self._terms
            ],
        }
        write_json(folder / FACTS, content)

    @staticmethod
    def load(folder: str | Path, parts: FeatureParts | None = None) -> FeatureReward:
        """Read what ``save`` wrote.

        Args:
            folder: with the files, or a run's with a ``reward`` folder.
            parts: what the sets need besides tokens.

        Raises:
            UserError: nothing is there, or it cannot be read.
        """
        folder = Path(run_part(str(folder), "reward"))
        content = saved_facts(folder)
        try:
            numbers = load_file(folder / _NUMBERS)
            if _digest(folder / _NUMBERS) != content["numbers"]:
                raise ValueError("weights and names are not of one save")
            sets = [feature_set(saved["settings"], parts or FeatureParts()) for saved in content["sets"]]
            reward = FeatureReward(sets)
            for place, (term, saved) in enumerate(zip(reward._terms, content["sets"], strict=True)):
                term.weights, term.center, term.spread = numbers[str(place)], saved["center"], saved["spread"]
            reward.is_fitted, reward.facts = content["is_fitted"], content["fit"]
        except UserError:
            raise
        except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
            raise _unreadable(folder, error) from error
        return reward


def saved_facts(folder: str | Path) -> dict[str, Any]:
    """What ``feature_reward.json`` in a folder says.

    Raises:
        UserError: it is not there, cannot be read, or is of another version.
    """
    folder = Path(folder)
    try:
        content = read_json(folder / FACTS)
        version = content["format"]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise _unreadable(folder, error) from error
    if version != _FORMAT:
        raise UserError(
            f"the feature reward has format {version}; this version of tutelage reads {_FORMAT}.",
            remedy="Fit it anew.",
            file=str(folder / FACTS),
        )
    return content


def _unreadable(folder: Path, error: Exception) -> UserError:
    return UserError(
        f"the feature reward cannot be read: {first_line(error)}.",
        remedy="Give the reward folder of a run with a feature reward, whole.",
        file=str(folder),
        field="reward",
    )


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _learn(
    term: _Term, design: Design, strength: float | None, cross_validate: bool, seed: int
) -> tuple[np.ndarray | None, dict[str, float]]:
    """Fit a set; held-out margins in units of its spread, and facts with SET for its name."""
    features = term.features
    fit = fit_linear(
        design,
        features.choose(design.groups),
        scaling=features.scaling,
        unpaired=features.compares_across_prompts,
        strength=strength,
        cross_validate=cross_validate,
        seed=seed,
    )
    places = np.concatenate([[], *design.judged_groups()]).astype(int)
    term.weights, term.spread = fit.weights, spread_within(design, fit.scores)
    term.center = float(fit.scores[places].mean()) if len(places) else 0.0
    facts = {"features/SET": float(features.width), "strength/SET": fit.strength}
    facts |= {f"accuracy/SET/{kind}": value for kind, value in fit.accuracies(design).items()}
    return None if fit.margins is None else fit.margins / term.spread, facts


def _standardize(term: _Term, design: Design) -> None:
    """The spread and the center of a set that is not learned, over the samples of the judged kind.

    Demonstrations are left out: of the policy's log-prob, theirs on its training prompts says only what it memorized.
    """
    judged = [
        samples
        for group, kind in zip(design.groups, design.group_kinds, strict=True)
        if kind == design.judged_kind
        and (samples := group.select(group.places(Role.SAMPLE, Role.REJECTED))).completions
    ]
    values = term.features.choose(judged)[:, 0]
    term.weights = np.ones(1)
    ends = np.cumsum([len(group.completions) for group in judged])[:-1]
    variances = [part.var(ddof=1) for part in np.split(values, ends) if len(part) > 1] or [values.var()]
    term.center, term.spread = float(values.mean()), float(np.sqrt(np.mean(variances))) or 1.0
