"""tutelage clean: rank demonstrations, and write the better ones."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rich.console import Console

from tutelage.cli.output import OutputFolder
from tutelage.cli.parser import (
    columns_of,
    command_parser,
    length_arguments,
    row_arguments,
    weight_arguments,
)
from tutelage.data.columns import NUM_ROWS, check_demonstrations, peek
from tutelage.errors import UserError
from tutelage.evaluation.cleaning import number_dropped
from tutelage.models.paths import require_model
from tutelage.ranges import LARGEST, SEED, number, whole

__all__ = ["main"]

_OUTPUTS = ("folds/*", "ranking.jsonl", "kept.jsonl", "clean.html")


def main(args: Sequence[str], console: Console) -> None:
    """Rank demonstrations from the worst to the best, write the ranking and those that are kept, and show the worst.

    By default the rank is the log-prob per token under a model that did not see the row: adapters are trained by SFT on
    all folds of the data but one, and each judges the fold that it was not trained on.
    """
    parser = command_parser("clean", main.__doc__, row_arguments, length_arguments, weight_arguments)
    parser.add_argument("dataset_name", metavar="DATA", help="Demonstrations: a hub name, a folder or a file.")
    parser.add_argument(
        "--model_name_or_path", required=True, help="The model to train; or whose answers a reward judges."
    )
    parser.add_argument("--output_dir", required=True, help="Folder for the ranking, the kept rows and the page.")
    amount = parser.add_mutually_exclusive_group(required=True)
    amount.add_argument("--drop", type=number(0, 1, below=True), help="Share of the rows to drop, such as 0.3.")
    amount.add_argument("--keep", type=whole(1), help="Number of rows to keep.")
    parser.add_argument(
        "--by",
        default="log_prob",
        choices=["log_prob", "reward"],
        help="What rows are ranked by: the out-of-fold log-prob per token, or the reward of the demonstration minus that "
        "of the model's own greedy answer.",
    )
    parser.add_argument("--reward", help="With --by reward: a reward, or the folder of a run that learned one.")
    parser.add_argument("--num_folds", type=whole(2), default=2, help="Folds, and adapters to train.")
    parser.add_argument(
        "--fold_epochs",
        type=number(0, LARGEST, above=True),
        default=3.0,
        help="Passes over the demonstrations of each adapter.",
    )
    parser.add_argument(
        "--fold_learning_rate", type=number(0, above=True), default=2e-4, help="Peak learning rate of the adapters."
    )
    parser.add_argument("--fold_batch_size", type=whole(1), default=8, help="Demonstrations per optimizer step.")
    parser.add_argument("--lora_r", type=whole(1, 2**16), default=16, help="Rank of the adapters.")
    parser.add_argument("--show", type=whole(0), default=20, help="How many of the worst rows are shown.")
    parser.add_argument("--seed", type=SEED, default=0, help="Seed of the folds and of their training.")
    parser.add_argument("--batch_size", type=whole(1), default=16, help="Rows per forward pass.")
    parser.add_argument("--sampling_batch_size", type=whole(1), default=64, help="Sequences decoded in parallel.")
    parser.add_argument("--resume", action="store_true", help="Go on with the adapters in --output_dir.")
    parser.add_argument("--overwrite_output_dir", action="store_true", help="Replace what is in --output_dir.")
    options = parser.parse_args(args)
    _check(options)
    with OutputFolder(
        options.output_dir,
        resume=options.resume,
        overwrite=options.overwrite_output_dir,
        outputs=_OUTPUTS,
        reads={
            "dataset_name": options.dataset_name,
            "model_name_or_path": options.model_name_or_path,
            "reward": options.reward,
        },
        remedy="Use --resume to go on with its adapters, --overwrite_output_dir to replace it, or another folder.",
    ) as folder:
        # Imported now that the arguments are good: it takes seconds.
        from tutelage.cli.cleaning import clean
        from tutelage.cli.libraries import quiet_libraries

        quiet_libraries()
        clean(options, console, before_training=folder.clear)


def _check(options: argparse.Namespace) -> None:
    """Refuse what can be refused before anything heavy is imported."""
    if (options.by == "reward") != (options.reward is not None):
        given = options.reward is not None
        raise UserError(
            "has an effect with --by reward alone." if given else "no reward is given.",
            remedy="Add --by reward, or leave it out." if given else "Add --reward FOLDER.",
            field="reward",
        )
    require_model(options.model_name_or_path)
    if options.reward is not None:
        require_model(options.reward, "reward", "reward")
    check_demonstrations(options.dataset_name, split=options.split, columns=columns_of(options))
    found = peek(options.dataset_name)
    known = found is not None and options.split == "train" and len(found.rows) < NUM_ROWS
    # Of other data the number of rows is known later; the share can be judged now.
    rows = len(found.rows) if found is not None and known else max(2, options.keep or 0)
    number_dropped(rows, drop=options.drop, keep=options.keep)
