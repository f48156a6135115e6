"""From what an evaluation found to what results.json holds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from tutelage.errors import UserError
from tutelage.evaluation.policy import Answers, Evaluation, EvaluationSet
from tutelage.evaluation.statistics import paired_difference
from tutelage.results import AnswerRecord, EvaluationRecord, RetentionRecord, RunRecord, SampleRecord

__all__ = ["evaluated", "retention"]

_SHOWN_SAMPLES = 12


def evaluated(record: RunRecord, evaluation: Evaluation, rows: EvaluationSet) -> RunRecord:
    """The record with the findings, and with the answers to the first rows for people to read."""
    samples = []
    for index, demonstration in enumerate(rows.demonstrations[:_SHOWN_SAMPLES]):
        prompt = demonstration.prompt
        if not isinstance(prompt, str):
            prompt = "\n".join(f"{message['role']}: {message['content']}" for message in prompt)
        sampled, greedy = (_answer(answers, index) for answers in (evaluation.sampled, evaluation.greedy))
        samples.append(SampleRecord(demonstration.row, prompt, demonstration.completion, sampled, greedy))
    return replace(record, evaluation=evaluation.record(rows.source), samples=samples)


def retention(before: EvaluationRecord, after: EvaluationRecord) -> RetentionRecord:
    """What changed between two evaluations of the same rows.

    A quantity that is not finite somewhere has no change; the notes of the evaluation say so.

    Raises:
        UserError: the two are not of the same rows.
    """
    if before.rows != after.rows or before.task != after.task:
        raise UserError(
            "the rows of another task were evaluated before training on other rows, or by another verifier, than after.",
            remedy="Evaluate both on the same rows.",
            file=after.dataset,
        )
    change = {
        name: paired_difference(now, then)  # type: ignore[arg-type]
        for name in after.per_row.keys() & before.per_row.keys()
        if _all_finite(now := after.per_row[name]) and _all_finite(then := before.per_row[name])
    }
    return RetentionRecord(before, after, dict(sorted(change.items())))


def _all_finite(values: Sequence[float | None]) -> bool:
    return all(value is not None and math.isfinite(value) for value in values)


def _answer(answers: Answers | None, index: int) -> AnswerRecord | None:
    """The first of a row's answers."""
    if answers is None:
        return None
    return AnswerRecord(answers.texts[index][0], None if answers.scores is None else answers.scores[index][0])
