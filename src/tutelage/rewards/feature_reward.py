"""A reward that is linear in named features: fitted in seconds on a CPU, and its weights can be read."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from tutelage.data import Tokenization
from tutelage.errors import UserError
from tutelage.files import read_json, replacing_alone, write_json
from tutelage.groups import Group, Role
from tutelage.models.loading import base_causal_lm, load_model, load_tokenizer
from tutelage.models.paths import FEATURE_REWARD, first_line, run_part
from tutelage.rewards.base import reward_func
from tutelage.rewards.comparisons import Comparisons, TruncatedSamples, contrast
from tutelage.rewards.explicit import ExplicitReward
from tutelage.rewards.feature_sets import FeatureParts, FeatureSet, feature_set, feature_sets
from tutelage.rewards.hidden_features import HiddenFeatures, HiddenSource
from tutelage.rewards.linear import UNPAIRED, Design, accuracies, compare, fit_linear, spread_within
from tutelage.scoring.logps import Layout, cached_token_logps

__all__ = ["FeatureReward", "Spoken", "saved_facts"]

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
                _standardize(term, design, comparisons, truncated_samples)
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

    def explain(
        self, group: Group, place: int, *, top: int = 10, text: Callable[[Sequence[int]], str] | None = None
    ) -> list[Spoken]:
        """What spoke for and against an answer: the features with the largest contributions, largest first.

        Where a set's features compare only within a prompt, values are relative to the mean of the group's completions.
        Features that are read alike (the units of a layer) are one: its value is their weighted sum, and its weight 1.

        Args:
            place: of the completion among the group's.
            text: decodes token ids.
        """
        return self.explain_all(group, top=top, text=text)[place]

    def explain_all(
        self, group: Group, *, top: int = 10, text: Callable[[Sequence[int]], str] | None = None
    ) -> list[list[Spoken]]:
        """As ``explain``, for each completion of the group."""
        spoken: list[list[Spoken]] = [[] for _ in group.completions]
        for term in self._terms if self.is_fitted else ():
            for found, of_term in zip(spoken, _spoken(term, group, text), strict=True):
                found += of_term
        return [sorted(found, key=lambda said: -abs(said.contribution))[:top] for found in spoken]

    # --- elsewhere ------------------------------------------------------------------------------------------------------

    def as_reward_func(self, tokenization: Tokenization) -> Callable[..., list[float]]:
        """A function for ``reward_funcs`` of TRL's trainers; see ``reward_func``."""
        return reward_func(self, tokenization, "feature_reward")

    @property
    def is_classifier(self) -> bool:
        """Whether a model for sequence classification can compute it: fitted on the last state of the last token alone."""
        features = self.sets[0]
        return (
            len(self.sets) == 1
            and isinstance(features, HiddenFeatures)
            and (features.depths, features.pooling) == ((1.0,), "last")
            and self.is_fitted
        )

    def save_as_classifier(self, folder: str | Path, tokenizer: PreTrainedTokenizerBase) -> float:
        """Write what ``AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)`` loads.

        For ``hidden`` alone, with the last token's state at depth 1, which is what such models score.

        Returns:
            what is lost: the scores written are these minus this constant, because the heads of these models have no
            bias. Differences within and across prompts are the same.

        Raises:
            UserError: the reward is made of other features, is not fitted, its base has an adapter in it, or transformers
                has no such model of its type.
        """
        if not self.is_classifier:
            raise UserError(
                "only a fitted reward on 'hidden' alone, at depth 1 with the last token's state, is a model for sequence "
                "classification.",
                remedy="Fit one with HiddenFeatures(source, depths=(1.0,), pooling='last').",
            )
        body = cast(HiddenFeatures, self.sets[0]).source.model()
        if isinstance(body, PeftModel):
            raise UserError("the base has an adapter in it.", remedy="Load the reward with the base model alone.")
        pad_token_id = cast(HiddenFeatures, self.sets[0]).source.pad_token_id
        (term,) = self._terms
        weights = torch.tensor(term.weights / term.spread)
        head = nn.Linear(len(weights), 1, bias=False)
        head.weight = nn.Parameter(weights[None].to(base_causal_lm(body).dtype))
        reward = ExplicitReward(body, head, pad_token_id=pad_token_id)
        if reward.why_no_classifier is not None:
            raise UserError(
                f"{reward.why_no_classifier}.", remedy="Use the feature reward itself.", field="hidden_pooling"
            )
        reward.save_pretrained(folder, tokenizer)
        return -term.center / term.spread

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
        with replacing_alone(folder / _NUMBERS) as temporary:
            save_file(numbers, temporary)
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
        write_json(folder / FEATURE_REWARD, content)

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

    @staticmethod
    def from_pretrained(
        folder: str | Path,
        *,
        base_model: str | None = None,
        logp_model: str | None = None,
        load: Callable[[str], nn.Module] = load_model,
        batch_size: int = 16,
        layout: Layout = "auto",
    ) -> FeatureReward:
        """Read what ``save`` wrote, with the tokenizer beside it; models are loaded when they are first needed.

        Args:
            base_model: for ``hidden``; None takes the one that the JSON names.
            logp_model: the policy, for ``logp``; None takes the policy beside the reward in a run's folder.
            load: loads a model by its name.
            batch_size, layout: as for ``cached_token_logps``.

        Raises:
            UserError: as ``load``; at the first use, that no model is known or it cannot be loaded.
        """
        folder = Path(run_part(str(folder), "reward"))
        content = saved_facts(folder)

        @cache
        def tokenizer() -> PreTrainedTokenizerBase:
            return load_tokenizer(str(folder))

        @cache
        def base() -> nn.Module:
            return load(_named(base_model or content.get("base_model"), "base_model", "hidden", folder))

        @cache
        def policy() -> nn.Module:
            beside = folder.parent / "policy"
            known = logp_model or (str(beside) if beside.is_dir() else None)
            return load(_named(known, "logp_model", "logp", folder))

        options: dict[str, Any] = {"batch_size": batch_size, "layout": layout}
        parts = FeatureParts(
            text=lambda ids: str(tokenizer().decode(list(ids), skip_special_tokens=True)),
            hidden=HiddenSource(base, **options),
            logps=lambda groups: cached_token_logps(policy(), groups, **options),
        )
        return FeatureReward.load(folder, parts)


def saved_facts(folder: str | Path) -> dict[str, Any]:
    """What ``feature_reward.json`` in a folder says.

    Raises:
        UserError: it is not there, cannot be read, or is of another version.
    """
    folder = Path(folder)
    try:
        content = read_json(folder / FEATURE_REWARD)
        version = content["format"]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise _unreadable(folder, error) from error
    if version != _FORMAT:
        raise UserError(
            f"the feature reward has format {version}; this version of tutelage reads {_FORMAT}.",
            remedy="Fit it anew.",
            file=str(folder / FEATURE_REWARD),
        )
    return content


def _named(name: str | None, field: str, features: str, folder: Path) -> str:
    if name is None:
        raise UserError(
            f"the features '{features}' need a model, and {FEATURE_REWARD} names none.",
            remedy=f"Give it (--{field}).",
            file=str(folder),
            field=field,
        )
    return name


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
        unpaired=features.compares_across_prompts,
        strength=strength,
        cross_validate=cross_validate,
        seed=seed,
    )
    places = np.concatenate([[], *design.judged_samples]).astype(int)
    term.weights, term.spread = fit.weights, spread_within(design, fit.scores)
    term.center = float(fit.scores[places].mean()) if len(places) else 0.0
    facts = {"features/SET": float(features.width), "strength/SET": fit.strength}
    facts |= {f"accuracy/SET/{kind}": value for kind, value in fit.accuracies(design).items()}
    return None if fit.margins is None else fit.margins / term.spread, facts


def _standardize(term: _Term, design: Design, comparisons: Comparisons, truncated_samples: TruncatedSamples) -> None:
    """The spread and the center of a set that is not learned, over the same samples as those of the learned ones.

    Demonstrations are left out: of the policy's log-prob, theirs on its training prompts says only what it memorized.
    """
    groups = [
        group
        for group in comparisons.paired.get(str(design.judged_kind), comparisons.unpaired)
        if design.judged_kind == UNPAIRED or contrast(group, truncated_samples)
    ]
    samples = [group.select(group.places(Role.SAMPLE, Role.REJECTED)) for group in groups]
    values = np.asarray(term.features.choose(samples))[:, 0]
    parts = np.split(values, np.cumsum([len(group.completions) for group in samples])[:-1])
    variances = [part.var(ddof=1) for part in parts if len(part) > 1] or [values.var()]
    term.weights = np.ones(1)
    term.center, term.spread = float(values.mean()), float(np.sqrt(np.mean(variances))) or 1.0


def _spoken(term: _Term, group: Group, text: Callable[[Sequence[int]], str] | None) -> list[list[Spoken]]:
    """What a set says of each completion of a group."""
    features = term.features
    matrix = features.matrix([group])
    values_CF = matrix.toarray() if hasattr(matrix, "toarray") else np.asarray(matrix)
    if not features.compares_across_prompts:
        values_CF = values_CF - values_CF.mean(axis=0)
    return [_said(term, values, text) for values in values_CF]


def _said(term: _Term, values: np.ndarray, text: Callable[[Sequence[int]], str] | None) -> list[Spoken]:
    weights = term.weights / term.spread
    columns: dict[str, list[int]] = {}
    for column in np.flatnonzero(values * weights):
        columns.setdefault(term.features.readable(int(column), text), []).append(int(column))
    found = []
    for name, alike in columns.items():
        contribution = float(values[alike] @ weights[alike])
        value, weight = (contribution, 1.0) if len(alike) > 1 else (float(values[alike[0]]), float(weights[alike[0]]))
        found.append(Spoken(term.features.name, name, value, weight, contribution))
    return found
