"""tutelage sample: completions of a model for a dataset's prompts, as JSON lines."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from tutelage.cli.parser import (
    columns_of,
    command_parser,
    data_arguments,
    length_arguments,
    new_file,
    weight_arguments,
)
from tutelage.data.columns import check_prompts
from tutelage.errors import UserError
from tutelage.models.paths import require_model
from tutelage.ranges import SEED, TEMPERATURE, number, whole

if TYPE_CHECKING:
    from tutelage.data import Tokenization
    from tutelage.groups import Group

__all__ = ["main"]


def main(args: Sequence[str], console: Console) -> None:
    """Sample completions for the prompts of a dataset and write them as JSON lines."""
    parser = command_parser("sample", main.__doc__, data_arguments, length_arguments, weight_arguments)
    parser.add_argument("--model_name_or_path", required=True, help="A model, or the folder of a run.")
    parser.add_argument("--output", required=True, help="The .jsonl file to write; it must not exist yet.")
    parser.add_argument("--num_samples", type=whole(1), default=1, help="Completions per prompt.")
    parser.add_argument(
        "--temperature", type=number(0, TEMPERATURE.high), default=1.0, help="0 takes the likeliest token."
    )
    parser.add_argument("--top_k", type=whole(0), default=0, help="Top-k sampling; 0 turns it off.")
    parser.add_argument(
        "--top_p", type=number(0, 1, above=True), default=1.0, help="Top-p (nucleus) sampling; 1 turns it off."
    )
    parser.add_argument("--seed", type=SEED, default=0, help="Seed of the samples.")
    parser.add_argument("--batch_size", type=whole(1), default=64, help="Sequences decoded in parallel.")
    options = parser.parse_args(args)
    output = new_file(options.output)
    require_model(options.model_name_or_path)
    check_prompts(options.dataset_name, split=options.split, columns=columns_of(options))
    _draw(options, output, console)


def _draw(options: argparse.Namespace, output: Path, console: Console) -> None:
    # Imported now that the arguments are good: it takes seconds.
    from tutelage.cli.common import computing, load_data, load_policy, load_tokenization
    from tutelage.cli.libraries import quiet_libraries
    from tutelage.cli.progress import TerminalProgress
    from tutelage.data.records import group_record
    from tutelage.files import write_json_lines
    from tutelage.sampling import SamplingParams, TransformersSampler
    from tutelage.terminal import say

    quiet_libraries()
    tokenization = load_tokenization(options, options.model_name_or_path)
    model = load_policy(options, options.model_name_or_path, tokenization)
    dataset = load_data(options)
    groups, conversational = _prompts(dataset, tokenization, options.dataset_name)
    try:
        params = SamplingParams(
            max_completion_length=options.max_completion_length,
            stop_ids=tokenization.stop_ids(conversational),
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            seed=options.seed,
        )
    except ValueError as error:
        raise UserError(f"{error}.") from error
    sampler = TransformersSampler(model, batch_size=options.batch_size, pad_token_id=tokenization.pad_id)
    with (
        computing(options, options.model_name_or_path, console),
        TerminalProgress(console, "sample") as progress,
        progress.phase("sampling", len(groups)) as advance,
    ):
        done = 0

        def count(place: int, drawn: Any) -> None:
            nonlocal done
            done += 1
            advance(done)

        drawn = sampler.sample(
            [group.prompt_ids for group in groups],
            params,
            num_samples=options.num_samples,
            rows=[group.row for group in groups],
            on_finished=count,
        )
    sampled = (
        group.add(sample.completion for sample in samples) for group, samples in zip(groups, drawn, strict=True)
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json_lines(output, (group_record(group, tokenization.text) for group in sampled))
    say(console, f"{len(groups)} prompts, {options.num_samples} completion(s) each: {output}")


def _prompts(dataset: Any, tokenization: Tokenization, source: str) -> tuple[list[Group], bool]:
    """The prompts, with their demonstrations where there are some, and whether they are lists of messages."""
    from tutelage.data.tokenized import tokenized_prompts

    prompts = list(tokenized_prompts(dataset, tokenization, source=source))
    if not prompts:
        raise UserError("no prompt is left.", remedy="Give at least one.", file=source)
    return [prompt.group for prompt in prompts], prompts[0].conversational
