"""From what an evaluation found to what results.json holds."""

from __future__ import annotations

from dataclasses import replace

from tutelage.evaluation.policy import Answers, Evaluation, EvaluationSet
from tutelage.results import AnswerRecord, RunRecord, SampleRecord

__all__ = ["evaluated"]

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


def _answer(answers: Answers | None, index: int) -> AnswerRecord | None:
    if answers is None:
        return None
    return AnswerRecord(answers.texts[index], None if answers.scores is None else answers.scores[index])
