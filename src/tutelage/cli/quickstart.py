"""tutelage quickstart: the whole comparison on a small language model and a task with a verifier."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from rich.console import Console

from tutelage.cli.arguments import DataArguments, ModelArguments
from tutelage.cli.output import OutputFolder
from tutelage.cli.parser import CommandParser
from tutelage.cli.progress import TerminalProgress
from tutelage.cli.train import ALGORITHMS, train
from tutelage.data import load_dataset
from tutelage.errors import UserError
from tutelage.evaluation.policy import EvaluationSet
from tutelage.evaluation.verifiers import reasoning_gym_rows
from tutelage.models.loading import load_model, load_tokenizer
from tutelage.report import summary_table, verdicts, write_report
from tutelage.report.summary import duration
from tutelage.results import evaluation_record, reset_peak_memory, run_record, write_results
from tutelage.testing.gemma import GEMMA_LICENSE, gemma_3_270m

__all__ = ["main"]

# Sums of two numbers of two digits: hard for 270M parameters, easy to get better at, checked by arithmetic.
_TASK_OPTIONS = {"chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2}}

# Seconds that each part took on two CPU cores; only their proportions matter, for the time that is left.
_PARTS = {"model": 55, "base": 30, "sft": 60, "continued-sft": 30, "spin": 45, "irft": 45}


def main(args: Sequence[str], console: Console) -> None:
    """Train SFT, then from its checkpoint continued SFT, SPIN and IRFT; evaluate all; write the report."""
    options = _parse(args)
    out = Path(options.output_dir)
    with OutputFolder(
        str(out),
        overwrite=options.overwrite_output_dir,
        outputs=("*.jsonl", "report.html", *_PARTS),
        remedy="Use --overwrite_output_dir to replace it (make quickstart ARGS=--overwrite_output_dir), or another folder.",
    ) as folder:
        folder.clear()
        records = _run(options, out, console)
    write_report(records, out / "report.html")
    console.print(summary_table(records))
    for sentence in verdicts(records):
        console.print(sentence, highlight=False, markup=False)
    console.print(f"report: {out / 'report.html'}", highlight=False, markup=False)


def _parse(args: Sequence[str]) -> argparse.Namespace:
    parser = CommandParser(prog="tutelage quickstart", description=main.__doc__, allow_abbrev=False)
    parser.add_argument("--model_name_or_path", help="Any model; by default Gemma 3 270M from the package index.")
    parser.add_argument("--task", default="chain_sum", help="A reasoning-gym task with written solutions.")
    parser.add_argument("--rows", type=int, default=256, help="Demonstrations to train on.")
    parser.add_argument("--test_rows", type=int, default=200, help="Held-out rows.")
    parser.add_argument("--max_completion_length", type=int, default=16, help="Completions are cut here, in tokens.")
    parser.add_argument("--seed", type=int, default=0, help="Of data, training and samples.")
    parser.add_argument("--full", action="store_true", help="Full size: 2,000 demonstrations, 500 held-out rows.")
    parser.add_argument("--output_dir", default="quickstart", help="Where models, results and the report go.")
    parser.add_argument("--overwrite_output_dir", action="store_true", help="Replace what an earlier quickstart left.")
    options = parser.parse_args(args)
    if options.full:
        options.rows, options.test_rows = 2000, 500
    if min(options.rows, options.test_rows) < 16:
        raise UserError("at least 16 rows are needed.", field="rows / test_rows")
    return options


def _run(options: argparse.Namespace, out: Path, console: Console) -> list[dict[str, Any]]:
    plan = _Plan(console, options.rows)
    train_rows, test_rows = _data(options)
    console.print(
        f"[bold]tutelage quickstart[/bold]: task {options.task}, {len(train_rows)} demonstrations, "
        f"{len(test_rows)} held-out rows, seed {options.seed}",
        highlight=False,
    )
    with plan.part("model", "getting the model ready"):
        if options.model_name_or_path is None:
            console.print(GEMMA_LICENSE, style="dim", highlight=False)
            with TerminalProgress(console, "model") as progress, progress.phase("converting (first time only)"):
                options.model_name_or_path = str(gemma_3_270m())
    out.mkdir(parents=True, exist_ok=True)
    train_file, test_file = _save(train_rows, out / "train.jsonl"), _save(test_rows, out / "test.jsonl")
    training = {
        "max_completion_length": options.max_completion_length,
        "seed": options.seed,
        "per_device_train_batch_size": 16,
        "warmup_steps": 0.1,
        "logging_steps": 4,
        "save_strategy": "no",
        "report_to": "none",
        "verifier": f"reasoning_gym:{options.task}",
    }
    data = DataArguments(dataset_name=str(train_file), eval_dataset_name=str(test_file))
    base = ModelArguments(model_name_or_path=options.model_name_or_path, use_peft=True, lora_dropout=0.0)
    records = []
    with plan.part("base", "the model as it is"):
        records.append(_evaluate_base(base, data, training, console))
        write_results(out / "base", records[0])
    # The same passes over the demonstrations for the control and both methods, from the same checkpoint.
    after_sft = replace(base, model_name_or_path=str(out / "sft"))
    for name, algorithm, start, epochs in (
        ("sft", "sft", "base", 3),
        ("continued-sft", "sft", "sft", 1),
        ("spin", "spin", "sft", 1),
        ("irft", "irft", "sft", 1),
    ):
        with plan.part(name, f"{name} from {start}, {epochs} pass(es) over the demonstrations"):
            config, _ = ALGORITHMS[algorithm]
            # Going on at the rate that SFT began with undoes some of it; half of it is the stronger control.
            rate: dict[str, Any] = (
                {"learning_rate": config.adapter_learning_rate / 2} if name == "continued-sft" else {}
            )
            args = config(output_dir=str(out / name), run_name=name, num_train_epochs=epochs, **training, **rate)
            model = base if start == "base" else after_sft
            records.append(train(algorithm, data, model, args, console, start=start))
    return records


def _data(options: argparse.Namespace) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Training and held-out rows without a prompt in common."""
    wanted = options.rows + options.test_rows
    made = reasoning_gym_rows(options.task, 3 * wanted, options.seed, **_TASK_OPTIONS.get(options.task, {}))
    rows = list({row["prompt"]: row for row in made}.values())
    if len(rows) < wanted:
        raise UserError(
            f"the task '{options.task}' gave {len(rows)} different prompts, {wanted} are needed.",
            remedy="Lower --rows or --test_rows.",
            field="rows",
        )
    return rows[: options.rows], rows[options.rows : wanted]


def _save(rows: list[dict[str, str]], path: Path) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def _evaluate_base(
    model: ModelArguments, data: DataArguments, training: dict[str, Any], console: Console
) -> dict[str, Any]:
    reset_peak_memory()
    name = model.require_name()
    config = ALGORITHMS["sft"][0](output_dir="", **training)
    policy = load_model(name, dtype=torch.bfloat16).to(config.device)  # type: ignore[arg-type]
    rows = EvaluationSet.of(
        cast(Dataset, load_dataset(str(data.eval_dataset_name))),
        config.tokenization(load_tokenizer(name)),
        verifier=config.verifier,
        source=str(data.eval_dataset_name),
    )
    with TerminalProgress(console, "base") as progress, progress.phase("answering", 2 * len(rows.groups)) as advance:
        found = rows.evaluate(policy, seed=config.seed, sample=True, greedy=True, on_progress=advance)
    record = run_record(
        name="base", algorithm="base", model=name, dataset=str(data.eval_dataset_name), seed=config.seed
    )
    return record | evaluation_record(found, rows)


class _Plan:
    """Says which part runs, how many there are and how long they will still take."""

    def __init__(self, console: Console, rows: int):
        self.console = console
        self.done: dict[str, float] = {}
        self.scale = max(1.0, rows / 256)

    @contextmanager
    def part(self, name: str, description: str) -> Iterator[None]:
        left = sum(seconds for part, seconds in _PARTS.items() if part not in self.done)
        # How long parts took against what was expected; the model may lie ready and tells nothing.
        measured = {part: seconds for part, seconds in self.done.items() if part != "model"}
        pace = sum(measured.values()) / sum(_PARTS[part] for part in measured) if measured else self.scale
        begun = time.monotonic()
        self.console.print(
            f"\n[bold]{len(self.done) + 1}/{len(_PARTS)}[/bold] {description}   "
            f"[dim]about {duration(pace * left)} left[/dim]",
            highlight=False,
        )
        yield
        self.done[name] = time.monotonic() - begun
