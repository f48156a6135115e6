"""tutelage evaluate: what trained models learned, against their start and their controls."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from tutelage.cli.parser import (
    command_parser,
    data_arguments,
    length_arguments,
    require_at_least_one,
    weight_arguments,
)
from tutelage.cli.report import find_starts, short_labels, show_runs
from tutelage.data.columns import check_demonstrations
from tutelage.errors import UserError
from tutelage.models.paths import require_model
from tutelage.results import RunRecord, load_results, results_beside, write_results

__all__ = ["main"]


def main(args: Sequence[str], console: Console) -> None:
    """Evaluate trained models against the model they started from and against their controls."""
    parser = command_parser("evaluate", main.__doc__, data_arguments, length_arguments, weight_arguments)
    parser.add_argument(
        "--model_name_or_path",
        nargs="+",
        required=True,
        help="One or more models or run folders. The results of a run folder keep its training history.",
    )
    parser.add_argument(
        "--reference",
        help="The start, π_0 of the implicit reward β log π/π_0; evaluated too. By default there is no implicit reward.",
    )
    parser.add_argument("--verifier", help="Scores answers: reasoning_gym:NAME or module:function.")
    parser.add_argument("--output_dir", required=True, help="Where results and the report go.")
    parser.add_argument("--rows", type=int, help="Evaluate on the first N rows only.")
    parser.add_argument("--beta", type=float, default=0.1, help="Temperature of the implicit reward.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the samples.")
    parser.add_argument("--batch_size", type=int, default=16, help="Rows per forward pass.")
    parser.add_argument("--sampling_batch_size", type=int, default=64, help="Sequences decoded in parallel.")
    options = parser.parse_args(args)
    require_at_least_one(
        options, "max_prompt_length", "max_completion_length", "rows", "batch_size", "sampling_batch_size"
    )
    out = Path(options.output_dir)
    if out.is_file() or (out.exists() and any(out.iterdir())):
        raise UserError("the output folder is not empty.", file=str(out), remedy="Name another.", field="output_dir")
    names = [*([options.reference] if options.reference else []), *options.model_name_or_path]
    for name in names:
        require_model(name)
    check_demonstrations(options.dataset_name, split=options.split, limit=options.rows)
    show_runs(_evaluate(options, names, out, console), out / "report.html", console)


def _evaluate(options: argparse.Namespace, names: list[str], out: Path, console: Console) -> list[RunRecord]:
    """Evaluate each model and write its results; the first is the reference, if there is one."""
    # Imported now that the arguments are good: it takes seconds.
    from tutelage.cli.common import computing, load_data, load_policy, load_tokenization
    from tutelage.cli.libraries import quiet_libraries
    from tutelage.cli.progress import TerminalProgress
    from tutelage.evaluation.policy import EvaluationSet, can_sample
    from tutelage.evaluation.record import evaluated
    from tutelage.training.costs import peak_memory_bytes, reset_peak_memory

    quiet_libraries()
    labels = short_labels(names)
    dataset = load_data(options)
    reference, records = None, []
    for name, label in zip(names, labels, strict=True):
        reset_peak_memory()
        with (
            computing(options, name, console if not records else None),
            TerminalProgress(console, label) as progress,
            progress.phase("evaluating") as advance,
        ):
            tokenization = load_tokenization(options, name)
            model = load_policy(options, name, tokenization)
            rows = EvaluationSet.of(
                dataset, tokenization, verifier=options.verifier, limit=options.rows, source=options.dataset_name
            )
            if options.reference and reference is None:
                rows.remember_reference(model, batch_size=options.batch_size)
                reference = rows.reference
            rows.reference = reference
            rows.require_answers(model)
            answers = can_sample(model)
            found = rows.evaluate(
                model,
                beta=options.beta,
                batch_size=options.batch_size,
                sampling_batch_size=options.sampling_batch_size,
                seed=options.seed,
                sample=answers,
                greedy=answers,
                on_progress=advance,
            )
        record = RunRecord(
            label, "base", model=name, dataset=None, seed=options.seed, peak_memory_bytes=peak_memory_bytes()
        )
        if results := results_beside(name):
            record = replace(load_results(results), name=label)
        records.append(evaluated(record, found, rows))
        del model
    find_starts(records, names)
    for record in records:
        if options.reference and record.id != records[0].id:
            record.start = record.start or records[0].id
        write_results(out / record.name, record)
    return records
