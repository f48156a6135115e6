"""tutelage quickstart: the whole comparison on a small language model and a task with a verifier."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from rich.console import Console

from tutelage.algorithms.controls import controls
from tutelage.algorithms.registry import find
from tutelage.cli.arguments import DataArguments, ModelArguments
from tutelage.cli.libraries import quiet_libraries
from tutelage.cli.output import OutputFolder
from tutelage.cli.parser import CommandParser
from tutelage.cli.progress import TerminalProgress
from tutelage.cli.train import train
from tutelage.data import load_dataset
from tutelage.errors import UserError
from tutelage.evaluation.policy import EvaluationSet
from tutelage.evaluation.record import evaluated
from tutelage.evaluation.verifiers import reasoning_gym_rows
from tutelage.files import write_json_lines
from tutelage.lab.english import english_rows
from tutelage.models.loading import end_ids, load_tokenizer
from tutelage.ranges import SEED, whole
from tutelage.report import summary_table, verdicts, write_report
from tutelage.report.summary import duration
from tutelage.results import RunRecord, write_results
from tutelage.sampling import SamplingParams, TransformersSampler
from tutelage.terminal import say, show
from tutelage.testing.gemma import GEMMA_LICENSE, gemma_3_270m
from tutelage.training.costs import peak_memory_bytes, reset_peak_memory
from tutelage.training.made import add_made

__all__ = ["Pace", "Plan", "main", "size_for"]


@dataclass(frozen=True)
class _Work:
    """What a part does for each demonstration: completions passed with and without gradient, and answers drawn.

    There are twice as many prompts without demonstrations as demonstrations.
    """

    trained: int = 0
    scored: int = 0
    sampled: int = 0


@dataclass(frozen=True)
class Pace:
    """How fast this machine is, in seconds per row.

    Attributes:
        scored: a forward pass of a demonstration.
        answered: drawing one answer.
    """

    scored: float
    answered: float

    def seconds(self, name: str, rows: int, test_rows: int) -> float:
        """What a part will take. A pass with gradient is about three forward passes."""
        work = _PARTS[name]
        training = rows * ((3 * work.trained + work.scored) * self.scored + work.sampled * self.answered)
        return training + test_rows * (2 * self.scored + 2 * self.answered)

    def total(self, rows: int, test_rows: int) -> float:
        return sum(self.seconds(name, rows, test_rows) for name in _PARTS)


def size_for(pace: Pace, budget: float, rows: int, test_rows: int) -> tuple[int, int]:
    """As many rows as can be done within ``budget`` seconds, in the same proportion: whole batches, at least 48."""
    share = min(1.0, budget / pace.total(rows, test_rows))
    return tuple(min(n, max(48, int(share * n) // 16 * 16)) if share < 1 else n for n in (rows, test_rows))  # type: ignore[return-value]


_ARRANGE = "arrange"  # a task of ours, with many right answers; see tutelage.lab.english

# Sums of two numbers of two digits: hard for 270M parameters, easy to get better at, checked by arithmetic.
_TASK_OPTIONS = {"chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2}}

# What the parts do, for the time they will take. Each also evaluates on the held-out rows.
_PARTS = {
    "base": _Work(),
    "sft": _Work(trained=10),
    "continued-sft": _Work(trained=5),
    "self-training": _Work(trained=2, scored=8, sampled=8),
    # Two out-of-fold policies of ten passes over half of the demonstrations each, and the policy's four samples; four samples
    # of the initial model, of the out-of-fold policies and of the policy, and a look at the validation rows per stage.
    "rft": _Work(trained=10 + 8, scored=10, sampled=4 + 4 + 8 + 2),
}

_MINUTES = 7.0
"""What the quickstart may take; a machine on which it would take longer gets fewer rows."""

_ROWS, _TEST_ROWS, _VALIDATION_ROWS = 64, 96, 32

_SLOW = f"{_MINUTES:.0f} minutes"

_TRIAL = 16  # rows of the trial that tells how fast the machine is


def main(args: Sequence[str], console: Console) -> None:
    """Train SFT, then from its checkpoint RFT and its controls: continued SFT and self-training. Evaluate and report."""
    quiet_libraries()
    options = _parse(args)
    out = Path(options.output_dir)
    with OutputFolder(
        str(out),
        overwrite=options.overwrite_output_dir,
        outputs=("*.jsonl", "report.html", *(f"{part}/*" for part in _PARTS)),
        remedy="Use --overwrite_output_dir to replace it (make quickstart ARGS=--overwrite_output_dir), or another folder.",
    ) as folder:
        folder.clear()
        records = _run(options, out, console)
        write_report(records, out / "report.html")
    show(console, summary_table(records))
    for sentence in verdicts(records):
        say(console, sentence)
    say(console, f"report: {out / 'report.html'}")


def _parse(args: Sequence[str]) -> argparse.Namespace:
    parser = CommandParser(prog="tutelage quickstart", description=main.__doc__, allow_abbrev=False)
    parser.add_argument("--model_name_or_path", help="Any model. By default Gemma 3 270M, from the package index.")
    parser.add_argument(
        "--task",
        default=_ARRANGE,
        help="arrange: words in an order without two of one kind side by side. Or a reasoning-gym task that comes with written solutions.",
    )
    parser.add_argument(
        "--rows",
        type=whole(16),
        help=f"Demonstrations to train on: {_ROWS}, or fewer where {_SLOW} would be too long.",
    )
    parser.add_argument("--test_rows", type=whole(16), help=f"Held-out rows: {_TEST_ROWS}, or fewer, as for --rows.")
    parser.add_argument(
        "--max_completion_length",
        type=whole(1),
        default=20,
        help="Maximum completion length, in tokens; longer completions are truncated.",
    )
    parser.add_argument("--seed", type=SEED, default=0, help="Random seed of data, training and samples.")
    parser.add_argument("--full", action="store_true", help="Full size: 2,000 demonstrations and 500 held-out rows.")
    parser.add_argument("--output_dir", default="quickstart", help="Folder for models, results and the report.")
    parser.add_argument(
        "--overwrite_output_dir", action="store_true", help="Replace the results of an earlier quickstart."
    )
    options = parser.parse_args(args)
    if options.full:
        options.rows, options.test_rows = 2000, 500
    options.sized = options.rows is None and options.test_rows is None  # what the user names is kept
    options.rows, options.test_rows = options.rows or _ROWS, options.test_rows or _TEST_ROWS
    return options


def _run(options: argparse.Namespace, out: Path, console: Console) -> list[RunRecord]:
    begun = time.monotonic()
    rows = _data(options)
    train_rows, test_rows = rows["train"], rows["test"]
    if options.model_name_or_path is None:
        say(console, GEMMA_LICENSE, style="dim")
        with (
            TerminalProgress(console, "model") as progress,
            progress.phase("getting it ready (a minute the first time)"),
        ):
            options.model_name_or_path = str(gemma_3_270m())
    base = ModelArguments(model_name_or_path=options.model_name_or_path, use_peft=True, lora_dropout=0.0)
    precision = base.settle_precision()
    training = {
        "max_completion_length": options.max_completion_length,
        "seed": options.seed,
        "per_device_train_batch_size": 8,
        "warmup_steps": 0.1,
        "logging_steps": 4,
        "save_strategy": "no",
        "report_to": "none",
        "verifier": "tutelage.lab.english:judge" if options.task == _ARRANGE else f"reasoning_gym:{options.task}",
        "bf16": precision.dtype is torch.bfloat16,
    }
    start = _Start(base, training)
    with TerminalProgress(console, "machine") as progress, progress.phase(f"timing {_TRIAL} rows"):
        pace = start.pace(test_rows[:_TRIAL])
    asked = (len(train_rows), len(test_rows))
    if options.sized:
        sized = size_for(pace, 60 * _MINUTES - (time.monotonic() - begun), *asked)
        train_rows, test_rows = train_rows[: sized[0]], test_rows[: sized[1]]
    say(
        console,
        ("tutelage quickstart", "bold"),
        f": task {options.task}, {len(train_rows)} demonstrations, {len(test_rows)} held-out rows, seed {options.seed}, "
        f"computing in {precision}",
    )
    if asked != (len(train_rows), len(test_rows)):
        say(
            console,
            f"  {asked[0]} demonstrations and {asked[1]} held-out rows would take "
            f"{duration(pace.total(*asked))} on this machine; --rows and --test_rows override this",
        )
    plan = Plan(console, {name: pace.seconds(name, len(train_rows), len(test_rows)) for name in _PARTS})
    out.mkdir(parents=True, exist_ok=True)
    rows |= {"train": train_rows, "test": test_rows, "prompts": rows["prompts"][: 2 * len(train_rows)]}
    add_made(out, (*(f"{name}.jsonl" for name in rows), "report.html", "base/results.json"), folders=_PARTS)
    files = {name: str(_save(part, out / f"{name}.jsonl")) for name, part in rows.items()}
    data = DataArguments(dataset_name=files["train"], eval_dataset_name=files["test"])
    records = []
    with plan.part("base", "the base model, untrained"):
        records.append(start.evaluate(files["test"], console))
        write_results(out / "base", records[0])
    del start
    after_sft = replace(base, model_name_or_path=str(out / "sft"))
    after_sft.precision = precision
    sampled = {
        "prompt_dataset": files["prompts"],
        "validation_dataset": files["validation"],
        "prompt_mix": 1.0,
        "num_train_epochs": 1,
        "per_device_train_batch_size": 4,
    }
    rate = find("sft").config.adapter_learning_rate
    settings: dict[str, tuple[str, dict[str, Any]]] = {
        "sft": ("sft", {"num_train_epochs": 10}),
        # Going on at the rate that SFT began with undoes some of it; half of it is the stronger control.
        "continued-sft": ("sft", {"num_train_epochs": 5, "learning_rate": rate / 2}),
        "self-training": (
            "rft",
            sampled | dict(controls("self_training", adapter=True)[0].settings),
        ),
        # As in the claims grid of the laboratory there is no gate and no choice among stages: 32 rows could not show that a reward
        # beats chance where most answers of the start are right.
        "rft": (
            "rft",
            {**sampled, "fold_epochs": 10, "reward_gate": "off", "keep_policy": "last"},
        ),
    }
    for name, (algorithm, own) in settings.items():
        with plan.part(name, f"{name} from {'base' if name == 'sft' else 'sft'}"):
            config = find(algorithm).config
            args = config(output_dir=str(out / name), run_name=name, **(training | own))
            records.append(train(algorithm, data, base if name == "sft" else after_sft, args, console))
    return records


def _data(options: argparse.Namespace) -> dict[str, list[dict[str, str]]]:
    """Demonstrations, prompts without them, validation and held-out rows, without a prompt in common."""
    sizes = {
        "train": options.rows,
        "prompts": 2 * options.rows,
        "validation": _VALIDATION_ROWS,
        "test": options.test_rows,
    }
    wanted = sum(sizes.values())
    if options.task == _ARRANGE:
        rows = english_rows(wanted, options.seed)
    else:
        made = reasoning_gym_rows(options.task, 3 * wanted, options.seed, **_TASK_OPTIONS.get(options.task, {}))
        rows = list({row["prompt"]: row for row in made}.values())
    if len(rows) < wanted:
        raise UserError(
            f"the task '{options.task}' gave only {len(rows)} different prompts; {wanted} are needed.",
            remedy="Lower --rows or --test_rows.",
            field="rows",
        )
    found, start = {}, 0
    for name, size in sizes.items():
        found[name] = rows[start : start + size]
        start += size
    found["prompts"] = [{"prompt": row["prompt"]} for row in found["prompts"]]
    return found


def _save(rows: list[dict[str, str]], path: Path) -> Path:
    write_json_lines(path, rows)
    return path


class _Start:
    """The model that everything starts from: how fast it is here, and what it can do.

    Args:
        model: names it; its precision is settled.
        training: settings of the runs.
    """

    def __init__(self, model: ModelArguments, training: dict[str, Any]):
        reset_peak_memory()
        self.name = model.require_name()
        self.config = find("sft").config(output_dir="", **training)
        self.policy = model.load().to(self.config.device)
        tokenizer = load_tokenizer(self.name)
        self.tokenization = self.config.tokenization(tokenizer, model_end_ids=end_ids(self.policy, tokenizer))
        self.precision = model.precision or model.settle_precision()

    def pace(self, rows: list[dict[str, str]]) -> Pace:
        """Seconds per row, on a few rows; the first call of all is slow and does not count."""
        with self.precision.autocast(self.config.device):
            self._timed(rows[:2])
            scored, answered = self._timed(rows)
        return Pace(scored / len(rows), answered / len(rows))

    def _timed(self, rows: list[dict[str, str]]) -> tuple[float, float]:
        """Seconds of a forward pass of the demonstrations, and of drawing an answer to each prompt."""
        evaluation_set = EvaluationSet.of(Dataset.from_list(rows), self.tokenization)
        begun = time.perf_counter()
        evaluation_set.remember_reference(self.policy)
        scored = time.perf_counter() - begun
        sampler = TransformersSampler(self.policy, pad_token_id=self.tokenization.pad_id)
        params = SamplingParams(
            max_completion_length=self.tokenization.max_completion_length,
            stop_ids=self.tokenization.stop_ids(evaluation_set.demonstrations[0].conversational),
        )
        prompts = [group.prompt_ids for group in evaluation_set.groups]
        begun = time.perf_counter()
        sampler.sample(prompts, params, rows=range(len(prompts)))
        return scored, time.perf_counter() - begun

    def evaluate(self, source: str, console: Console) -> RunRecord:
        """What results.json holds of the base model, untrained."""
        rows = EvaluationSet.of(
            cast(Dataset, load_dataset(source)), self.tokenization, verifier=self.config.verifier, source=source
        )
        with (
            TerminalProgress(console, "base") as progress,
            progress.phase("answering", 2 * len(rows.groups)) as advance,
            self.precision.autocast(self.config.device),
        ):
            found = rows.evaluate(self.policy, seed=self.config.seed, sample=True, greedy=True, on_progress=advance)
        peak = peak_memory_bytes()
        record = RunRecord("base", "base", self.name, dataset=None, seed=self.config.seed, peak_memory_bytes=peak)
        return evaluated(record, found, rows)


class Plan:
    """Says which part runs, how many there are and how long they will still take.

    Args:
        expected: seconds of each part, as the trial on this machine says; what the parts that are done really took
            corrects it.
    """

    def __init__(self, console: Console, expected: dict[str, float], clock: Callable[[], float] = time.monotonic):
        self.console, self.expected, self.clock = console, expected, clock
        self.done: dict[str, float] = {}

    @property
    def left(self) -> float:
        """Seconds that the parts which are not done will take."""
        left = sum(seconds for part, seconds in self.expected.items() if part not in self.done)
        pace = sum(self.done.values()) / sum(self.expected[part] for part in self.done) if self.done else 1.0
        return pace * left

    @contextmanager
    def part(self, name: str, description: str) -> Iterator[None]:
        say(
            self.console,
            (f"\n{len(self.done) + 1}/{len(self.expected)}", "bold"),
            f" {description}   ",
            (f"about {duration(self.left)} left", "dim"),
        )
        begun = self.clock()
        yield
        self.done[name] = self.clock() - begun
