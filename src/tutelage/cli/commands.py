"""tutelage sample | evaluate | report | data: what does not train."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from tutelage.cli.common import (
    command_parser,
    data_arguments,
    length_arguments,
    load_data,
    load_policy,
    load_tokenization,
    new_file,
    weight_arguments,
)
from tutelage.cli.progress import TerminalProgress
from tutelage.data import Tokenization, inspect_dataset, print_inspection, tokenized_prompts
from tutelage.data.records import group_record
from tutelage.errors import UserError
from tutelage.evaluation.policy import EvaluationSet, can_sample
from tutelage.evaluation.record import evaluated
from tutelage.files import write_json_lines
from tutelage.groups import Group
from tutelage.report import summary_table, verdicts, write_report
from tutelage.results import RunRecord, load_results, write_results
from tutelage.sampling import SamplingParams, TransformersSampler
from tutelage.training.costs import peak_memory_bytes, reset_peak_memory

__all__ = ["data", "evaluate", "report", "sample"]


def sample(args: Sequence[str], console: Console) -> None:
    """Draw completions for a data set's prompts and write them as JSON lines."""
    parser = command_parser("sample", sample.__doc__, data_arguments, length_arguments, weight_arguments)
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
    with TerminalProgress(console, "sample") as progress, progress.phase("sampling", len(groups)) as advance:
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
    console.print(f"{len(groups)} prompts, {options.num_samples} completion(s) each: {output}", highlight=False)


def _prompts(dataset: Any, tokenization: Tokenization, source: str) -> tuple[list[Group], bool]:
    """The prompts, with their demonstrations where there are some, and whether they are lists of messages."""
    prompts = list(tokenized_prompts(dataset, tokenization, source=source))
    if not prompts:
        raise UserError("no prompt is left.", remedy="Give at least one.", file=source)
    return [prompt.group for prompt in prompts], prompts[0].conversational


def evaluate(args: Sequence[str], console: Console) -> None:
    """Say what trained models learned, against the model they started from and their controls."""
    parser = command_parser("evaluate", evaluate.__doc__, data_arguments, length_arguments, weight_arguments)
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
    parser.add_argument("--rows", type=int, help="Look at the first so many rows.")
    parser.add_argument("--beta", type=float, default=0.1, help="Temperature of the implicit reward.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the samples.")
    parser.add_argument("--batch_size", type=int, default=16, help="Rows a forward pass.")
    options = parser.parse_args(args)
    out = Path(options.output_dir)
    if out.is_file() or (out.exists() and any(out.iterdir())):
        raise UserError("the output folder is in use.", file=str(out), remedy="Name another.", field="output_dir")
    names = [*([options.reference] if options.reference else []), *options.model_name_or_path]
    labels = _labels(names)
    dataset = load_data(options)
    reference, records = None, []
    for name, label in zip(names, labels, strict=True):
        reset_peak_memory()
        with TerminalProgress(console, label) as progress, progress.phase("evaluating") as advance:
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
                sampling_batch_size=options.batch_size,
                seed=options.seed,
                sample=answers,
                greedy=answers,
                on_progress=advance,
            )
        records.append(evaluated(_record_of(name, label, options.seed), found, rows))
        del model
    _find_starts(records, names)
    for record in records:
        if options.reference and record.id != records[0].id:
            record.start = record.start or records[0].id
        write_results(out / record.name, record)
    _show(records, out / "report.html", console)


def report(args: Sequence[str], console: Console) -> None:
    """Write one page that compares runs."""
    parser = command_parser("report", report.__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="Run folders, or their results.json.")
    parser.add_argument("--output", default="report.html", help="The page to write.")
    options = parser.parse_args(args)
    records = [load_results(run) for run in options.runs]
    names = [record.name for record in records]
    for record, label in zip(records, _labels(options.runs), strict=True):
        if names.count(record.name) > 1:  # two runs of one algorithm: their folders tell them apart
            record.name = label
    _find_starts(records, options.runs)
    _show(records, Path(options.output), console)


def data(args: Sequence[str], console: Console) -> None:
    """Show what the model will see of a data set."""
    parser = command_parser("data", data.__doc__, length_arguments)
    parser.add_argument("dataset_name", metavar="DATA", help="A hub name, a folder or a file.")
    parser.add_argument("--dataset_config", help="Configuration of a hub data set.")
    parser.add_argument("--split", default="train", help="Split of the data set.")
    parser.add_argument("--turns", default="last", choices=["last", "all"], help="Which assistant turns are taken.")
    parser.add_argument(
        "--on_long_prompt",
        default="error",
        choices=["error", "drop"],
        help="What training would do: stop, or drop the row.",
    )
    parser.add_argument("--model_name_or_path", required=True, help="Whose tokenizer to use.")
    parser.add_argument("--trust_remote_code", action="store_true", help="Run code that comes with the model.")
    options = parser.parse_args(args)
    tokenization = load_tokenization(options, options.model_name_or_path)
    found = inspect_dataset(load_data(options), tokenization, turns=options.turns, source=options.dataset_name)
    print_inspection(found, console)


def _find_starts(records: Sequence[RunRecord], folders: Sequence[str]) -> None:
    """A run whose model is another one's folder started from that one, if its record does not say."""
    ids = {Path(folder).resolve(): record.id for folder, record in zip(folders, records, strict=True)}
    for record in records:
        start = ids.get(Path(record.model).resolve())
        if record.start is None and record.algorithm != "base" and start != record.id:
            record.start = start


def _show(records: Sequence[RunRecord], path: Path, console: Console) -> None:
    write_report(records, path)
    console.print(summary_table(records))
    for sentence in verdicts(records):
        console.print(sentence, highlight=False, markup=False)
    console.print(f"report: {path}", highlight=False, markup=False)


def _record_of(model: str, label: str, seed: int) -> RunRecord:
    """A run folder's record, or one of a model as it was found; under the name that this comparison gives it."""
    if (Path(model) / "results.json").exists():
        return replace(load_results(model), name=label)
    return RunRecord(label, "base", model=model, dataset=None, seed=seed, peak_memory_bytes=peak_memory_bytes())


def _labels(names: Sequence[str]) -> list[str]:
    """Short different names: the last parts of the paths, numbered where they are alike."""
    labels: list[str] = []
    for name in names:
        label = Path(name).name or name
        labels.append(
            label if label not in labels else f"{label}-{sum(other.startswith(label) for other in labels) + 1}"
        )
    return labels
