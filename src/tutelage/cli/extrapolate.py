"""tutelage extrapolate: beyond a trained model, away from the one that its training started from (ExPO)."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence

from rich.console import Console

from tutelage.cli.output import OutputFolder
from tutelage.cli.parser import columns_of, command_parser, length_arguments, row_arguments
from tutelage.data.columns import check_demonstrations
from tutelage.errors import UserError
from tutelage.models.paths import require_model
from tutelage.ranges import SEED, number, whole

__all__ = ["main"]

_OUTPUTS = (
    "extrapolation.*",
    "README.md",
    "config.json",
    "generation_config.json",
    "model*.safetensors*",
    "adapter_*",
    "tokenizer*",
    "special_tokens_map.json",
    "chat_template*",
    "vocab.*",
    "merges.txt",
    "added_tokens.json",
    "*.model",
    "*.py",
)
_NEEDS = {"score": "verifier", "greedy_score": "verifier", "reward": "reward"}
_WITH_ALPHAS = ("select", "dataset_name", "verifier", "reward")


def main(args: Sequence[str], console: Console) -> None:
    """Write the model θ₁ + α(θ₁ − θ₀): beyond an aligned model, away from the one that its training started from (ExPO).

    With --alphas each α is measured on validation rows, the best is written, and a page shows the curve with the length of
    the answers beside it.
    """
    options = _options(args)
    output = OutputFolder(
        options.output_dir,
        overwrite=options.overwrite_output_dir,
        outputs=_OUTPUTS,
        again=True,
        remedy="Use --overwrite_output_dir to replace what tutelage wrote there, or name another folder.",
        reads={
            "start": options.start,
            "aligned": options.aligned,
            "dataset_name": options.dataset_name,
            "reward": options.reward,
        },
    )
    with output:
        # Imported now that the arguments are good: it takes seconds.
        from tutelage.cli.extrapolating import extrapolate
        from tutelage.cli.libraries import quiet_libraries

        quiet_libraries()
        extrapolate(options, output, console)


def _options(args: Sequence[str]) -> argparse.Namespace:
    parser = command_parser("extrapolate", main.__doc__)
    parser.add_argument(
        "--start", required=True, help="θ₀, the model that training started from: a hub name or a folder."
    )
    parser.add_argument(
        "--aligned",
        required=True,
        help="θ₁, what was trained from it. An adapter goes with its base, or with an adapter on the same base.",
    )
    parser.add_argument("--output_dir", required=True, help="Folder for the model, the record and the page.")
    amount = parser.add_mutually_exclusive_group(required=True)
    amount.add_argument(
        "--alpha", type=number(), help="α: 0 is the aligned model, −1 the start, 0.3 to 0.5 is a usual choice."
    )
    amount.add_argument(
        "--alphas",
        type=_alphas,
        metavar="A,B,…",
        help="Values of α to choose from, on --dataset_name; 0 is always among them.",
    )
    parser.add_argument(
        "--select",
        nargs="?",
        const="auto",
        choices=["auto", "log_prob", "score", "greedy_score", "reward"],
        help="What the best α has most of: log-prob of the demonstrations, the verifier's score of answers at temperature 1 or of "
        "greedy ones, or the reward of answers at temperature 1. By default (auto) the score with a verifier, else the reward if "
        "one is given, else the log-prob.",
    )
    parser.add_argument(
        "--dtype",
        choices=["bfloat16", "float16", "float32"],
        help="Precision of the weights that are written; by default the stored one of the aligned model.",
    )
    parser.add_argument(
        "--overwrite_output_dir", action="store_true", help="Replace what tutelage wrote in --output_dir."
    )
    measured = parser.add_argument_group("on validation rows, with --alphas")
    measured.add_argument("--dataset_name", help="Validation rows: a hub name, a folder or a file.")
    measured.add_argument("--verifier", help="Scores answers: reasoning_gym:NAME or module:function.")
    measured.add_argument("--reward", help="Scores answers: a reward, or the folder of a run that learned one.")
    measured.add_argument("--rows", type=whole(1), help="Measure on the first N rows only.")
    measured.add_argument("--eval_samples", type=whole(1), default=1, help="Answers to each row at temperature 1.")
    measured.add_argument("--seed", type=SEED, default=0, help="Seed of the answers.")
    measured.add_argument("--batch_size", type=whole(1), default=16, help="Rows per forward pass.")
    measured.add_argument("--sampling_batch_size", type=whole(1), default=64, help="Sequences decoded in parallel.")
    row_arguments(parser)
    length_arguments(parser)
    parser.add_argument("--trust_remote_code", action="store_true", help="Run code that comes with the model.")
    options = parser.parse_args(_joined(args))
    _check(options)
    return options


def _check(options: argparse.Namespace) -> None:
    """Refuse what can be refused before anything heavy is imported."""
    for field in _WITH_ALPHAS:
        if options.alphas is None and getattr(options, field) is not None:
            raise UserError(
                "has an effect with --alphas alone: one α is not chosen.",
                remedy="Leave it out, or give --alphas.",
                field=field,
            )
    if options.alphas is not None:
        if options.dataset_name is None:
            raise UserError("α is chosen on validation rows.", remedy="Add --dataset_name ROWS.", field="dataset_name")
        if options.select in (None, "auto"):
            options.select = "score" if options.verifier else "reward" if options.reward else "log_prob"
        needed = _NEEDS.get(options.select)
        if needed and getattr(options, needed) is None:
            raise UserError(f"there is no {needed} to select by.", remedy=f"Add --{needed}.", field="select")
    for field in ("start", "aligned"):
        require_model(getattr(options, field), field)
    if options.reward is not None:
        require_model(options.reward, "reward", "reward")
    if options.dataset_name is not None:
        columns = columns_of(options)
        check_demonstrations(options.dataset_name, split=options.split, limit=options.rows, columns=columns)


def _alphas(text: str) -> list[float]:
    """Finite numbers and 0, each once, in order.

    Raises:
        argparse.ArgumentTypeError: one is no finite number, or there is none but 0.

    >>> _alphas("0.5,-1,0.5")
    [-1.0, 0.0, 0.5]
    """
    found = {0.0, *(float(number()(part.strip())) for part in text.split(","))}
    if len(found) < 2:
        raise argparse.ArgumentTypeError("must be numbers to choose from, such as 0.25,0.5,1.")
    return sorted(found)


def _joined(args: Sequence[str]) -> list[str]:
    """Arguments with a list that begins with a negative number joined to its option: argparse takes it for an option."""
    found: list[str] = []
    for arg in args:
        if found and found[-1] in ("--alpha", "--alphas") and re.match(r"-[\d.]", arg):
            found[-1] += f"={arg}"
        else:
            found.append(arg)
    return found
