"""tutelage sample: completions of a model for a data set's prompts, as JSON lines."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from tutelage.cli.parser import (
    command_parser,
    data_arguments,
    length_arguments,
    new_file,
    require_at_least_one,
    weight_arguments,
)
from tutelage.data.columns import check_demonstrations, peek
from tutelage.data.demonstrations import is_conversational
from tutelage.errors import UserError
from tutelage.models.paths import require_model

if TYPE_CHECKING:
    from tutelage.data import Tokenization
    from tutelage.groups import Completion

__all__ = ["main"]


def main(args: Sequence[str], console: Console) -> None:
    """Draw completions for a data set's prompts and write them as JSON lines."""
    parser = command_parser("sample", main.__doc__, data_arguments, length_arguments, weight_arguments)
    parser.add_argument("--model_name_or_path", required=True, help="A model, or the folder of a run.")
    parser.add_argument("--output", required=True, help="The .jsonl file to write; it must not exist yet.")
    parser.add_argument("--num_samples", type=int, default=1, help="Completions a prompt.")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 takes the likeliest token.")
    parser.add_argument("--top_k", type=int, default=0, help="Sample from the k likeliest tokens; 0 keeps all.")
    parser.add_argument("--top_p", type=float, default=1.0, help="Sample from this much probability; 1 keeps all.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the samples.")
    parser.add_argument("--batch_size", type=int, default=64, help="Sequences decoded side by side.")
    options = parser.parse_args(args)
    output = new_file(options.output)
    require_at_least_one(options, "max_prompt_length", "max_completion_length", "num_samples", "batch_size")
    require_model(options.model_name_or_path)
    _check_rows(options)
    _draw(options, output, console)


def _draw(options: argparse.Namespace, output: Path, console: Console) -> None:
    # Imported now that the arguments are good: it takes seconds.
    from tutelage.cli.common import computing, load_data, load_policy, load_tokenization, write_json_lines
    from tutelage.cli.libraries import quiet_libraries
    from tutelage.cli.progress import TerminalProgress
    from tutelage.sampling import SamplingParams, TransformersSampler

    quiet_libraries()
    tokenization = load_tokenization(options, options.model_name_or_path)
    model = load_policy(options, options.model_name_or_path, tokenization)
    dataset = load_data(options)
    places, prompts, demonstrations = _prompts(dataset, tokenization, options.dataset_name)
    try:
        params = SamplingParams(
            max_completion_length=options.max_completion_length,
            stop_ids=tokenization.stop_ids(_holds_messages(dataset, options.dataset_name)),
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
        progress.phase("sampling", len(prompts)) as advance,
    ):
        done = 0

        def count(place: int, drawn: Any) -> None:
            nonlocal done
            done += 1
            advance(done)

        drawn = sampler.sample(
            prompts,
            params,
            num_samples=options.num_samples,
            rows=places,
            on_finished=count,
        )
    write_json_lines(
        output,
        (
            {
                "row": place,
                "prompt": tokenization.text(prompt),
                "demonstration": demonstration and tokenization.text(demonstration.token_ids),
                "samples": [tokenization.text(s.token_ids) for s in samples],
                "finished": [s.finished for s in samples],
                "logps": [sum(s.token_logps) for s in samples],
                "prompt_ids": prompt,
                "token_ids": [s.token_ids for s in samples],
                "demonstration_ids": demonstration and demonstration.token_ids,
                "demonstration_finished": demonstration and demonstration.finished,
            }
            for place, prompt, demonstration, samples in zip(places, prompts, demonstrations, drawn, strict=True)
        ),
    )
    console.print(f"{len(prompts)} prompts, {options.num_samples} completion(s) each: {output}", highlight=False)


def _check_rows(options: argparse.Namespace) -> None:
    rows = peek(options.dataset_name)
    if rows is not None and not _holds_prompts_alone(rows):
        check_demonstrations(options.dataset_name, split=options.split)


def _holds_prompts_alone(dataset: Any) -> bool:
    return "prompt" in dataset.column_names and not {"completion", "chosen"} & set(dataset.column_names)


def _holds_messages(dataset: Any, source: str) -> bool:
    if _holds_prompts_alone(dataset):
        return not isinstance(dataset[0]["prompt"], str)
    return is_conversational(dataset, source=source)


def _prompts(
    dataset: Any, tokenization: Tokenization, source: str
) -> tuple[list[int], list[tuple[int, ...]], list[Completion | None]]:
    """Number, tokens and demonstration of each prompt; data to sample from may hold prompts alone."""
    from tutelage.data.tokenization import group_from_row, tokenize_dataset

    if not _holds_prompts_alone(dataset):
        groups = [group_from_row(row) for row in tokenize_dataset(dataset, tokenization, source=source)]  # type: ignore[arg-type]
        demonstrations: list[Completion | None] = [group.completions[0] for group in groups]
        return [group.row for group in groups], [group.prompt_ids for group in groups], demonstrations
    places, prompts = [], []
    for place, row in enumerate(dataset):
        if not row["prompt"]:
            raise UserError(
                "is empty.", remedy="Write a prompt or remove the row.", file=source, row=place + 1, field="prompt"
            )
        prompt = tokenization.prompt_ids(row["prompt"])
        if len(prompt) <= tokenization.max_prompt_length:
            places.append(place)
            prompts.append(prompt)
        elif tokenization.on_long_prompt == "error":
            raise UserError(
                f"the prompt has {len(prompt)} tokens, more than {tokenization.max_prompt_length}.",
                remedy="Raise --max_prompt_length or use --on_long_prompt drop.",
                file=source,
                row=place + 1,
                field="prompt",
            )
    if not prompts:
        raise UserError("no prompt is left.", remedy="Give at least one.", file=source)
    return places, prompts, [None] * len(prompts)
