"""tutelage evaluate: what trained models learned, against their start and their controls."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from tutelage.cli.output import OutputFolder
from tutelage.cli.parser import (
    columns_of,
    command_parser,
    data_arguments,
    length_arguments,
    weight_arguments,
)
from tutelage.cli.report import find_starts, short_labels, show_runs
from tutelage.data.columns import check_demonstrations
from tutelage.errors import UserError
from tutelage.models.paths import require_model
from tutelage.ranges import SEED, number, whole
from tutelage.results import RunRecord, write_results
from tutelage.training.made import finish_made

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
        help="The start, π_0: evaluated too. Without it there is no implicit reward β log π/π_0 and no KL to the start.",
    )
    parser.add_argument("--verifier", help="Scores answers: reasoning_gym:NAME or module:function.")
    parser.add_argument("--output_dir", required=True, help="Where results and the report go.")
    parser.add_argument("--rows", type=whole(1), help="Evaluate on the first N rows only.")
    parser.add_argument("--beta", type=number(0, above=True), default=0.1, help="Temperature of the implicit reward.")
    parser.add_argument(
        "--eval_samples",
        type=whole(1),
        default=1,
        help="Answers to each row at temperature 1; with several and a verifier, diversity is measured too.",
    )
    parser.add_argument(
        "--retention_dataset",
        help="Rows of another task, on which models are compared with --reference: what was forgotten.",
    )
    parser.add_argument(
        "--retention_verifier", help="Scores answers to --retention_dataset; written as --verifier is."
    )
    parser.add_argument("--seed", type=SEED, default=0, help="Seed of the samples.")
    parser.add_argument("--batch_size", type=whole(1), default=16, help="Rows per forward pass.")
    parser.add_argument("--sampling_batch_size", type=whole(1), default=64, help="Sequences decoded in parallel.")
    options = parser.parse_args(args)
    _check_retention(options)
    out = Path(options.output_dir)
    names = [*([options.reference] if options.reference else []), *options.model_name_or_path]
    output = OutputFolder(
        options.output_dir,
        overwrite=False,
        again=True,
        remedy="Name another.",
        reads={
            "dataset_name": options.dataset_name,
            "retention_dataset": options.retention_dataset,
            **{f"model_name_or_path ({name})": name for name in names},
        },
    )
    for name in names:
        require_model(name)
    columns = columns_of(options)
    for source in (options.dataset_name, options.retention_dataset):
        if source:
            check_demonstrations(source, split=options.split, limit=options.rows, columns=columns)
    with output:
        records = _evaluate(options, names, console)
        output.clear()
        output.add("report.html", *(f"{record.name}/results.json" for record in records), unfinished=True)
        for record in records:
            write_results(out / record.name, record)
        show_runs(records, out / "report.html", console)
        finish_made(out)


def _check_retention(options: argparse.Namespace) -> None:
    if options.retention_verifier and not options.retention_dataset:
        raise UserError(
            "has no rows to score answers to.", remedy="Add --retention_dataset DATA.", field="retention_verifier"
        )
    if options.retention_dataset and not options.reference:
        raise UserError(
            "needs the start, to know what it could do.", remedy="Add --reference MODEL.", field="retention_dataset"
        )


def _evaluate(options: argparse.Namespace, names: list[str], console: Console) -> list[RunRecord]:
    """Evaluate each model; the first is the reference, if there is one."""
    # Imported now that the arguments are good: it takes seconds.
    from tutelage.cli.evaluating import Evaluator
    from tutelage.cli.libraries import quiet_libraries

    quiet_libraries()
    evaluator = Evaluator(options, console)
    labels = short_labels(names)
    records = [evaluator.record(name, label) for name, label in zip(names, labels, strict=True)]
    if options.reference:
        records = evaluator.against_reference(records)
    find_starts(records, names)
    for record in records:
        if options.reference and record.id != records[0].id:
            record.start = record.start or records[0].id
    return records
