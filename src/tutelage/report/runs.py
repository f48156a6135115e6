"""The part that each run plays in a comparison. Names play none: a renamed run keeps its part."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence

from tutelage.errors import UserError
from tutelage.results import CandidateRecord, EvaluationRecord, RunRecord

__all__ = [
    "candidates",
    "controls_of",
    "has_verifier_score",
    "is_control",
    "is_graded",
    "is_method",
    "is_plain_sft",
    "require_distinct_names",
    "same_place",
    "starts_of",
]


def require_distinct_names(runs: Sequence[RunRecord]) -> None:
    """Readers tell runs apart by their names, in tables, curves and verdicts.

    Raises:
        UserError: no run at all, or two of the same name.
    """
    if not runs:
        raise UserError("no runs to report on.", remedy="Give at least one run.")
    name, count = Counter(run.name for run in runs).most_common(1)[0]
    if count > 1:
        raise UserError(f"{count} runs are called {name!r}.", field="name", remedy="Rename all but one of them.")


def candidates(run: RunRecord) -> list[CandidateRecord]:
    """The policies that the run chose from, by stage, the start first; empty where nothing was chosen."""
    return sorted(run.selection, key=lambda candidate: candidate.stage)


def has_verifier_score(run: RunRecord) -> bool:
    """Whether a verifier scored the policies that the run chose from."""
    return any(candidate.verifier_score is not None for candidate in run.selection)


def is_graded(evaluations: Iterable[EvaluationRecord | None], kind: str) -> bool:
    """Whether a verifier gave part of a point (or more than one) in any of the evaluations.

    Then the mean score of a row is not the share of its answers that are right.

    Args:
        kind: ``sampled`` or ``greedy``.
    """
    return any(
        score != right
        for found in evaluations
        if found
        for score, right in zip(
            found.per_row.get(f"{kind}_score", ()), found.per_row.get(f"{kind}_right", ()), strict=True
        )
    )


def is_method(run: RunRecord) -> bool:
    """Whether the run has something to prove: neither a model as it was found nor a control."""
    return run.algorithm != "base" and not is_control(run)


def is_control(run: RunRecord) -> bool:
    """Whether the run is there to be beaten: SFT, the baseline of all, or self-training, which learns no reward."""
    return is_plain_sft(run) or (run.algorithm == "rft" and run.settings.get("reward") == "logp")


def is_plain_sft(run: RunRecord) -> bool:
    """Whether the run is maximum likelihood, and not SFT with another loss, which is a method like others."""
    return run.algorithm == "sft" and run.settings.get("loss_kind", "nll") == "nll"


def starts_of(run: RunRecord, runs: Sequence[RunRecord]) -> list[RunRecord]:
    """The records of what the run started from: the run whose output that was, or the model as it was found."""
    if run.start is not None:
        return [other for other in runs if other is not run and other.id == run.start]
    return [other for other in runs if other.algorithm == "base" and same_place(other.model, run.model)]


def controls_of(run: RunRecord, runs: Sequence[RunRecord]) -> list[RunRecord]:
    """By whatever name: runs of ``sft`` with the ordinary loss, and of self-training, from the same start."""
    starts = starts_of(run, runs)
    others = [other for other in runs if other is not run and other not in starts]
    return [other for other in others if is_control(other) and _same_start(other, run)]


def same_place(a: str, b: str) -> bool:
    """Whether two names of models or data are the same, or paths to the same place."""
    return a == b or os.path.abspath(a) == os.path.abspath(b)


def _same_start(a: RunRecord, b: RunRecord) -> bool:
    if a.start is not None and b.start is not None:
        return a.start == b.start
    return same_place(a.model, b.model)
