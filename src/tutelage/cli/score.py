"""tutelage score: rewards of the completions that a dataset or a file of samples holds."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from tutelage.cli.parser import (
    columns_of,
    command_parser,
    data_arguments,
    new_file,
    weight_arguments,
)
from tutelage.data.choices import holds_choices, read_choices, refuse_written_lists
from tutelage.data.columns import check_demonstrations, peek
from tutelage.data.readers import extension
from tutelage.errors import UserError
from tutelage.models.paths import ENSEMBLE, FEATURE_REWARD, require_model, run_part
from tutelage.ranges import number, whole
from tutelage.training.manifest import MANIFEST, Manifest

__all__ = ["main"]

_STAGE = ("stage-", "draw-", "negatives")  # folders of a run, whose manifest says what was written there


def main(args: Sequence[str], console: Console) -> None:
    """Score completions with a learned reward, or with the implicit reward of a trained policy.

    The data are demonstrations, preference pairs, or samples written by `tutelage sample` or a training stage. Samples
    are scored by their recorded tokens. Pairs with a column `subset`, and rows with lists of chosen and rejected answers,
    are counted as RewardBench and RewardBench 2 do.
    """
    options = _options(args)
    output = new_file(options.output)
    name = run_part(options.reward, "reward") if options.reward else options.policy
    _take_lengths(options, Path(name))
    for data in filter(None, (options.dataset_name, options.against)):
        _check_file(data, options)
    # Imported now that the arguments are good: it takes seconds.
    from tutelage.cli.libraries import quiet_libraries
    from tutelage.cli.scoring import score

    quiet_libraries()
    score(options, name, output, console)


def _check_file(name: str, options: argparse.Namespace) -> None:
    path = Path(name)
    if path.is_file() and path.parent.name.startswith(_STAGE) and (path.parent / MANIFEST).exists():
        Manifest(path.parent).require(path.name, "Resume its run, which makes it again, or score a copy elsewhere.")
    rows = peek(name)
    if rows is not None and extension(path) in (".csv", ".tsv") and "subset" in rows.column_names:
        refuse_written_lists(rows, name)
    if rows is not None and not columns_of(options).named and holds_choices(rows):
        for _ in read_choices(rows, source=name):
            pass
    elif rows is not None and "completions" not in rows.column_names:  # what `tutelage sample` and stages write has it
        check_demonstrations(name, split=options.split, columns=columns_of(options))


def _options(args: Sequence[str]) -> argparse.Namespace:
    parser = command_parser("score", main.__doc__, data_arguments, weight_arguments)
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--reward", help="A reward model, or the output folder of a run that learned one.")
    kind.add_argument("--policy", help="A trained model or run folder, scored by its implicit reward β log π/π_0.")
    parser.add_argument(
        "--reference",
        help="π_0, the model that the training of --policy started from. By default the base of its adapter.",
    )
    parser.add_argument(
        "--base_model",
        help="The base model that a feature reward reads, if it is not where it was when it was learned.",
    )
    parser.add_argument("--logp_model", help="The policy, for a feature reward with logp; by default the run's.")
    parser.add_argument(
        "--explain",
        type=whole(1),
        nargs="?",
        const=8,
        metavar="N",
        help="Tell which N features (8 where none is given) spoke for and against each answer; for a feature reward.",
    )
    parser.add_argument(
        "--beta", type=number(0, above=True), help="β, temperature of the implicit reward; 0.1 by default."
    )
    for length, unless in (("prompt", 512), ("completion", 256)):
        parser.add_argument(
            f"--max_{length}_length",
            type=whole(1),
            help=f"Maximum {length} length of a dataset, in tokens. By default what the reward was trained with, else {unless}.",
        )
    parser.add_argument(
        "--against",
        help="Other answers to the same rows, a file as --dataset_name takes it: tells the win rate, raw and at equal length.",
    )
    parser.add_argument("--batch_size", type=whole(1), default=16, help="Rows per forward pass.")
    parser.add_argument("--output", required=True, help="The .jsonl file to write. It must not exist yet.")
    options = parser.parse_args(args)
    for field in ("reference", "beta"):
        if options.reward and getattr(options, field) is not None:
            raise UserError("applies only to --policy.", remedy="Leave it out, or use --policy.", field=field)
    _check_feature_options(options)
    options.beta = 0.1 if options.beta is None else options.beta
    for field in ("reward", "policy", "reference", "base_model", "logp_model"):
        if getattr(options, field):
            require_model(getattr(options, field), field, "reward" if field == "reward" else "policy")
    return options


def _check_feature_options(options: argparse.Namespace) -> None:
    given = [field for field in ("explain", "base_model", "logp_model") if getattr(options, field) is not None]
    folder = Path(run_part(options.reward, "reward")) if options.reward else None
    if folder and options.explain is not None and (folder / ENSEMBLE).exists():
        raise UserError(
            "an ensemble is no sum of features.",
            remedy=f"Explain one of its members: --reward {folder / 'member-00'}.",
            field="explain",
        )
    if given and not (folder and _are_features(folder)):
        raise UserError(
            "applies only to a feature reward.", remedy="Leave it out, or give one as --reward.", field=given[0]
        )


def _are_features(folder: Path) -> bool:
    return any((part / FEATURE_REWARD).exists() for part in (folder, folder / "member-00"))


def _take_lengths(options: argparse.Namespace, folder: Path) -> None:
    """Limits that were not given are those the reward was trained with."""
    folder = folder / "member-00" if (folder / ENSEMBLE).exists() else folder
    found = [path for name in ("reward.json", FEATURE_REWARD) if (path := folder / name).exists()]
    known = json.loads(found[0].read_text(encoding="utf-8")) if options.reward and found else {}
    for field, default in (("max_prompt_length", 512), ("max_completion_length", 256)):
        if getattr(options, field) is None:
            setattr(options, field, known.get(field, default))
