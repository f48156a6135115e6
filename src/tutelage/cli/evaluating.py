"""What `tutelage evaluate` does once its arguments are good: one model after another on the same rows."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rich.console import Console

from tutelage.cli.common import computing, load_data, load_policy, load_tokenization
from tutelage.cli.progress import TerminalProgress
from tutelage.data import Tokenization, load_dataset
from tutelage.evaluation.policy import Evaluation, EvaluationSet, can_sample
from tutelage.evaluation.probes import model_probes
from tutelage.evaluation.record import evaluated, retention
from tutelage.results import EvaluationRecord, RetentionRecord, RunRecord, load_results, results_beside
from tutelage.training.costs import peak_memory_bytes, reset_peak_memory

__all__ = ["Evaluator"]


class Evaluator:
    """Evaluates models one after another; only one is in memory.

    Args:
        options: the command's. The first model is the reference, if they name one.
        console: told what is computed in.
    """

    def __init__(self, options: argparse.Namespace, console: Console):
        self.options, self.console = options, console
        self.dataset = load_data(options)
        self.other = (
            load_dataset(options.retention_dataset, split=options.split) if options.retention_dataset else None
        )
        self._reference: Any = None
        self._before: EvaluationRecord | None = None
        self._found: list[tuple[Evaluation, EvaluationSet]] = []

    def record(self, name: str, label: str) -> RunRecord:
        """What results.json holds of a model.

        Args:
            label: what the model is called.
        """
        options, first = self.options, not self._found
        reset_peak_memory()
        with (
            computing(options, name, self.console if first else None),
            TerminalProgress(self.console, label) as progress,
        ):
            tokenization = load_tokenization(options, name)
            model = load_policy(options, name, tokenization)
            rows = self._rows(self.dataset, tokenization, options.verifier, options.dataset_name)
            other = self._rows_of_another_task(tokenization)
            for each in (rows, other):
                if each is not None:
                    each.require_answers(model)
            if options.reference and first:
                rows.remember_reference(model, batch_size=options.batch_size)
                self._reference = rows.reference
            rows.reference = self._reference
            found = self._evaluated(rows, model, progress, answers=can_sample(model))
            kept = None
            if other is not None:
                answers = other.verifier is not None
                kept = self._retention(self._evaluated(other, model, progress, answers=answers).record(other.source))
        self._found.append((found, rows))
        seed, peak = options.seed, peak_memory_bytes()
        record = RunRecord(label, "base", model=name, dataset=None, seed=seed, peak_memory_bytes=peak)
        if results := results_beside(name):
            record = replace(load_results(results), name=label)
        probes = record.probes or model_probes(model)
        return replace(evaluated(record, found, rows), retention=kept or record.retention, probes=probes)

    def against_reference(self, records: Sequence[RunRecord]) -> list[RunRecord]:
        """The records with the KL of each model to the reference, which is asked once all answers are there.

        A model that knows other tokens than the reference has none.
        """
        options, name = self.options, self.options.reference
        if not any(found.sampled for found, _ in self._found):
            return list(records)
        with (
            computing(options, name, None),
            TerminalProgress(self.console, "reference") as progress,
            progress.phase("log-probs of the answers", len(records)) as advance,
        ):
            tokenization = load_tokenization(options, name)
            model, told = load_policy(options, name, tokenization), []
            for number, (record, (found, rows)) in enumerate(zip(records, self._found, strict=True), start=1):
                if rows.tokenization.tokenizer.get_vocab() == tokenization.tokenizer.get_vocab():
                    found = rows.against_start(found, model, batch_size=options.batch_size)
                told.append(replace(record, evaluation=found.record(rows.source)))
                advance(number)
        return told

    def _evaluated(self, rows: EvaluationSet, model: Any, progress: TerminalProgress, *, answers: bool) -> Evaluation:
        options = self.options
        name = "evaluating" if rows.source == options.dataset_name else "another task"
        with progress.phase(name, 2 * len(rows.groups) if answers else None) as advance:
            return rows.evaluate(
                model,
                beta=options.beta,
                batch_size=options.batch_size,
                sampling_batch_size=options.sampling_batch_size,
                seed=options.seed,
                sample=answers,
                num_samples=options.eval_samples,
                greedy=answers,
                score_samples=bool(options.reference),
                on_progress=advance,
            )

    def _rows(self, dataset: Any, tokenization: Tokenization, verifier: str | None, source: str) -> EvaluationSet:
        return EvaluationSet.of(dataset, tokenization, verifier=verifier, limit=self.options.rows, source=source)

    def _rows_of_another_task(self, tokenization: Tokenization) -> EvaluationSet | None:
        if self.other is None:
            return None
        options = self.options
        return self._rows(self.other, tokenization, options.retention_verifier, options.retention_dataset)

    def _retention(self, found: EvaluationRecord) -> RetentionRecord | None:
        """Beside what the reference can do; None for the reference itself."""
        if self._before is None:
            self._before = found
            return None
        return retention(self._before, found)
