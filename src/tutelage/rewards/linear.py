"""A linear reward learned from comparisons: logistic regression on differences of features, its strength by cross-validation."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse
from scipy.optimize import minimize_scalar
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from tutelage.groups import Group, Role
from tutelage.rewards.comparisons import Comparisons, TruncatedSamples, contrast, hardest_kind

__all__ = [
    "STRENGTHS",
    "UNPAIRED",
    "Design",
    "LinearFit",
    "accuracies",
    "choose_strength",
    "compare",
    "fit_linear",
    "spread_within",
]

UNPAIRED = "unpaired"
STRENGTHS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Inverse strengths C that cross-validation tries."""

FOLDS = 5
ENTRIES = 2**23
"""Pairs times features above which dense features are projected: more would take minutes."""


@dataclass(frozen=True)
class Design:
    """Which completions are compared, with which weight.

    Attributes:
        groups: hold every completion that is compared; C counts their completions in order.
        group_kinds: the kind of each group's samples: a kind of negative, or ``UNPAIRED``.
        better, worse: [P] which of the C completions.
        weights: [P]; those of a prompt's pairs of one kind sum to 1, however many groups they are in; in a resample, to how
            often the prompt was drawn.
        kinds: [P] of the pairs.
        folds: [P] the fold of a pair's prompt (an unpaired pair's is its demonstration's), from 0.
        folds_C: [C] the fold of a completion's prompt; -1 for unpaired ones.
        num_folds: below 2, nothing can be cross-validated.
        judged_kind: the kind of pairs on which strength is judged.
        judged_samples: of each prompt of that kind with something to compare, which of the C completions its samples are;
            where one equals a demonstration, that one.
    """

    groups: Sequence[Group]
    group_kinds: Sequence[str]
    better: np.ndarray
    worse: np.ndarray
    weights: np.ndarray
    kinds: np.ndarray
    folds: np.ndarray
    folds_C: np.ndarray
    num_folds: int
    judged_kind: str | None
    judged_samples: Sequence[np.ndarray]

    def only_paired(self) -> np.ndarray:
        """[P] which pairs are of one prompt."""
        return self.kinds != UNPAIRED

    def differences(self, matrix: Any) -> Any:
        """[P, F] features of the better completion minus those of the worse one."""
        return matrix[self.better] - matrix[self.worse]


def compare(
    comparisons: Comparisons, *, truncated_samples: TruncatedSamples = "floor", seed: int = 0, partners: int = 8
) -> Design:
    """Lay out what is compared: each demonstration with the samples of its prompt, and with samples of other prompts.

    Args:
        truncated_samples: as for ``contrast``: unless "score", only completions that both finished, or both did not.
        seed: of the folds and of the partners.
        partners: unpaired samples that each demonstrated prompt is compared with, at most.
    """
    generator = np.random.default_rng(seed)
    prompts = comparisons.prompts
    num_folds = min(FOLDS, len(prompts))
    shuffled = [prompts[place] for place in generator.permutation(len(prompts))]
    fold_of = {prompt: place % num_folds for place, prompt in enumerate(shuffled)}
    layout = _Layout(truncated_samples)
    for kind, groups in comparisons.paired.items():
        parts = [contrast(group, truncated_samples) for group in groups]
        compared = Counter(group.prompt_ids for group, found in zip(groups, parts, strict=True) if found)
        for group, found in zip(groups, parts, strict=True):
            weight = comparisons.times.get(group.prompt_ids, 1) / max(1, compared[group.prompt_ids])
            layout.add_paired(group, found, kind, fold_of[group.prompt_ids], weight)
    for finished in (True, False):
        layout.add_unpaired(comparisons.unpaired, finished, generator, partners)
    judged_kind = hardest_kind(dict.fromkeys(pair[3] for pair in layout.pairs))
    better, worse, weights, kinds, folds = zip(*layout.pairs, strict=True) if layout.pairs else ((),) * 5
    return Design(
        layout.groups,
        layout.group_kinds,
        np.array(better, dtype=int),
        np.array(worse, dtype=int),
        np.array(weights, dtype=float),
        np.array(kinds, dtype=object),
        np.array(folds, dtype=int),
        np.array(layout.folds_C, dtype=int),
        num_folds,
        judged_kind,
        [np.array(places) for kind, places in layout.samples if kind == judged_kind],
    )


class _Layout:
    """The completions of a design, group by group, and its pairs."""

    def __init__(self, truncated_samples: TruncatedSamples):
        self.truncated_samples: TruncatedSamples = truncated_samples
        self.groups: list[Group] = []
        self.group_kinds: list[str] = []
        self.folds_C: list[int] = []
        self.pairs: list[tuple[int, int, float, str, int]] = []
        self.samples: list[tuple[str, list[int]]] = []  # of each paired prompt: the kind, and places
        # One demonstration of each prompt and manner of ending: its place and its fold.
        self.demonstrated: dict[tuple[tuple[int, ...], bool], tuple[int, int]] = {}

    def add_paired(self, group: Group, parts: Sequence[Group], kind: str, fold: int, weight: float) -> None:
        """Compare within the parts that a group's contrast consists of; their pairs share its weight."""
        total = sum(len(part.pairs) for part in parts)
        places: dict[tuple[int, ...], int] = {}
        for part in parts:
            start = self._add(part, kind, fold)
            places |= {c.token_ids: start + place for place, c in enumerate(part.completions)}
            self.pairs += [(start + a, start + b, weight / total, kind, fold) for a, b in part.pairs]
            for place in part.places(Role.DEMONSTRATION):
                self.demonstrated.setdefault((part.prompt_ids, self._class(part, place)), (start + place, fold))
        worse = group.of(Role.SAMPLE, Role.REJECTED)
        if found := [places[c.token_ids] for c in worse if c.token_ids in places]:
            self.samples.append((kind, found))
        for place in group.places(Role.DEMONSTRATION):  # those with no sample of their prompt to be compared with
            if (key := (group.prompt_ids, self._class(group, place))) not in self.demonstrated:
                self.demonstrated[key] = (self._add(group.select([place]), kind, fold), fold)

    def add_unpaired(self, groups: Sequence[Group], finished: bool, generator: Any, partners: int) -> None:
        """Give each demonstration that ends in this manner samples of other prompts that do, drawn without replacement."""
        demonstrated = [
            (prompt_ids, *found) for (prompt_ids, ended), found in self.demonstrated.items() if ended == finished
        ]
        fitting = [
            (group, place)
            for group in groups
            for place in group.places(Role.SAMPLE)
            if self._class(group, place) == finished
        ]
        drawn = generator.permutation(len(fitting))[: partners * len(demonstrated)]
        shares = np.array_split(drawn, len(demonstrated)) if demonstrated else []
        for (_, place, fold), share in zip(demonstrated, shares, strict=True):
            for index in share:
                group, sample = fitting[index]
                start = self._add(group.select([sample]), UNPAIRED, -1)
                self.pairs.append((place, start, 1 / len(share), UNPAIRED, fold))
                self.samples.append((UNPAIRED, [start]))

    def _class(self, group: Group, place: int) -> bool:
        """What may be compared is equal in this."""
        return self.truncated_samples == "score" or group.completions[place].finished

    def _add(self, group: Group, kind: str, fold: int) -> int:
        start = len(self.folds_C)
        self.groups.append(group)
        self.group_kinds.append(kind)
        self.folds_C += [fold] * len(group.completions)
        return start


# --- the fit -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LinearFit:
    """Weights of features, and what cross-validation says of them.

    Attributes:
        weights: [F]; the score of a completion is its features times these.
        strength: C, the inverse of the L2 penalty's weight, for features divided by their scale.
        margins: [P] score of the better completion minus that of the worse one, by weights fitted without their prompt;
            None without cross-validation.
        scores: [C] likewise; unpaired completions' are by the weights of the whole fit.
    """

    weights: np.ndarray
    strength: float
    margins: np.ndarray | None
    scores: np.ndarray

    def accuracies(self, design: Design) -> dict[str, float]:
        """Share of pairs ranked rightly on held-out prompts, by kind; a tie counts half."""
        return {} if self.margins is None else accuracies(self.margins, design)


def fit_linear(
    design: Design,
    matrix: Any,
    *,
    unpaired: bool,
    strength: float | None = None,
    cross_validate: bool = True,
    seed: int = 0,
) -> LinearFit:
    """Logistic regression with L2 and without intercept on differences of features, so that it is symmetric.

    A feature is divided by the root mean square of its differences, so that the penalty treats all alike. (In planted tasks
    with 32 to 128 prompts, text features as they are, or divided by the root of that, ranked worse everywhere.)

    Args:
        matrix: [C, F] features, dense or sparse.
        unpaired: whether to learn from pairs of different prompts.
        strength: C; None takes the one of ``STRENGTHS`` that does best on held-out prompts.
        cross_validate: find margins on held-out prompts also where ``strength`` is given.
        seed: of the projection of dense features that are many.
    """
    kept = np.flatnonzero(design.only_paired() | unpaired)
    matrix, back = _scaled(design, matrix, kept, seed)
    differences = design.differences(matrix)
    if not len(kept) or not matrix.shape[1]:
        scores = np.zeros(len(design.folds_C))
        return LinearFit(back(np.zeros(matrix.shape[1])), strength or STRENGTHS[0], None, scores)
    margins = held_out = None
    if design.num_folds > 1 and (strength is None or cross_validate):
        tried = STRENGTHS if strength is None else (strength,)
        margins_PS, scores_CS = _held_out(design, matrix, differences, kept, tried)
        best = choose_strength(design, margins_PS)
        strength, margins, held_out = tried[best], margins_PS[:, best], scores_CS[:, best]
    strength = STRENGTHS[len(STRENGTHS) // 2] if strength is None else strength
    weights = next(_path(differences[kept], design.weights[kept], (strength,)))
    scores = matrix @ weights
    if held_out is not None:
        scores = np.where(design.folds_C >= 0, held_out, scores)
    return LinearFit(back(weights), strength, margins, scores)


def _scaled(design: Design, matrix: Any, kept: np.ndarray, seed: int):
    """The matrix to fit on, and the way back from its weights to those of the features as they were."""
    differences = design.differences(matrix)[kept]
    total = max(float(design.weights[kept].sum()), 1e-12)
    squares = differences.multiply(differences) if sparse.issparse(differences) else differences**2
    rms = np.sqrt(np.asarray(squares.T @ design.weights[kept]).ravel() / total)
    scale = np.where(rms > 1e-9, 1 / np.maximum(rms, 1e-9), 0.0)
    if sparse.issparse(matrix):
        return (matrix @ sparse.diags_array(scale)).tocsr(), lambda weights: weights * scale
    scaled = matrix * scale
    width = max(256, ENTRIES // max(1, len(kept)))
    if scaled.shape[1] <= width:
        return scaled, lambda weights: weights * scale
    random = np.random.default_rng(seed).standard_normal((scaled.shape[1], width)) / np.sqrt(width)
    return scaled @ random, lambda weights: (random @ weights) * scale


def _path(differences: Any, weights: np.ndarray, strengths: Sequence[float]):
    """Weights for each strength in turn, each fit starting from the last."""
    signs = np.where(np.arange(differences.shape[0]) % 2, -1.0, 1.0)  # two classes, and the same loss
    signed = sparse.diags_array(signs) @ differences if sparse.issparse(differences) else differences * signs[:, None]
    labels = (signs > 0).astype(int)
    if len(signs) == 1:  # two classes need two rows
        signed = sparse.vstack([signed, -signed]).tocsr() if sparse.issparse(signed) else np.vstack([signed, -signed])
        labels, weights = np.array([1, 0]), np.array([weights[0] / 2] * 2)
    model = LogisticRegression(fit_intercept=False, warm_start=True, max_iter=300, tol=1e-4)
    for strength in strengths:
        model.set_params(C=strength)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # of separable pairs at a weak penalty; near enough
            model.fit(signed, labels, sample_weight=weights)
        yield model.coef_[0].copy()


def _held_out(design: Design, matrix: Any, differences: Any, kept: np.ndarray, strengths: Sequence[float]):
    """[P, strengths] margins and [C, strengths] scores of each fold by weights fitted on the others."""
    margins_PS = np.zeros((len(design.better), len(strengths)))
    scores_CS = np.zeros((len(design.folds_C), len(strengths)))
    for fold in range(design.num_folds):
        training = kept[design.folds[kept] != fold]
        pairs, rows = np.flatnonzero(design.folds == fold), np.flatnonzero(design.folds_C == fold)
        if not len(training) or not len(pairs):
            continue
        for place, weights in enumerate(_path(differences[training], design.weights[training], strengths)):
            margins_PS[pairs, place] = differences[pairs] @ weights
            scores_CS[rows, place] = matrix[rows] @ weights
    return margins_PS, scores_CS


# --- what a fit is judged by -------------------------------------------------------------------------------------------


def choose_strength(design: Design, margins_PS: np.ndarray) -> int:
    """Which strength does best on held-out pairs of the judged kind: the least logistic loss that rescaled margins reach.

    Rescaled, because pairs of an easy kind make weights large, and the loss would then choose by confidence instead of by
    order. Equal ones: the strongest penalty.
    """
    judged = design.kinds == design.judged_kind
    weights = design.weights[judged]
    losses = [round(_rescaled_loss(margins[judged], weights), 6) for margins in margins_PS.T]
    return losses.index(min(losses))


def _rescaled_loss(margins: np.ndarray, weights: np.ndarray) -> float:
    spread = np.sqrt(np.average(margins**2, weights=weights))
    if not spread > 0:
        return float(np.log(2))

    def loss(log_factor: float) -> float:
        return float(np.average(np.logaddexp(0, -margins / spread * np.exp(log_factor)), weights=weights))

    return min(float(np.log(2)), loss(minimize_scalar(loss, bounds=(-7, 4), method="bounded").x))


def accuracies(margins: np.ndarray, design: Design) -> dict[str, float]:
    """Share of margins above 0 by kind of pairs, each prompt with the same weight; 0 counts half."""
    right = (margins > 0) + (margins == 0) / 2
    return {
        str(kind): float(np.average(right[of], weights=design.weights[of]))
        for kind in dict.fromkeys(design.kinds)
        if (of := design.kinds == kind).any()
    }


def spread_within(design: Design, scores: np.ndarray) -> float:
    """Root of the mean variance of scores within a prompt, over the samples of the judged kind; 1 where all are equal.

    Over all of them where no prompt has two."""
    several = [scores[places] for places in design.judged_samples if len(places) > 1]
    if not several and len(design.judged_samples) > 1:
        several = [scores[np.concatenate(design.judged_samples)]]
    variances = [found.var(ddof=1) for found in several]
    spread = float(np.sqrt(np.mean(variances))) if variances else 0.0
    return spread if spread > 1e-9 else 1.0
