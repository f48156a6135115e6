"""On which tasks is there something to win over SFT? Where more passes stop helping and the best of 8 answers is well above their mean.

    python examples/candidate_tasks.py --model MODEL --output_dir OUT

For each task: SFT with few demonstrations, once for each number of passes, each with warm-up and decay to zero; then answers to
held-out rows. The seeds are apart from those of any run that reports (100 and above).

Rewrites OUT/TASK.json after each cell. Start it again to continue, also with more tasks or passes.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from short_tasks import TASKS, Task, judge

from tutelage.algorithms import SFTConfig, SFTTrainer
from tutelage.evaluation.policy import Evaluation
from tutelage.files import write_json
from tutelage.models.loading import load_model, load_tokenizer


def summary(found: Evaluation) -> dict[str, float]:
    """Means over rows: of the score of answers at temperature 1 with its standard error, of the best and of the
    likeliest-token one, of the number of different right ones, and of the log-prob of the demonstration and the KL to the
    start (nats per sequence)."""
    sampled, greedy = found.sampled, found.greedy
    assert sampled is not None
    assert greedy is not None
    values = {
        "mean": sampled.score,
        "greedy": greedy.score,
        "oracle": [max(row) for row in sampled.scores or []],
        "distinct": sampled.distinct_right,
        "logp": found.demonstration_logps,
        "kl": sampled.kl,
    }
    error = float(np.std(sampled.score or [0.0], ddof=1)) / len(found.rows) ** 0.5
    return {name: float(np.mean(numbers)) for name, numbers in values.items() if numbers} | {"error": error}


def train(options: argparse.Namespace, task: Task, passes: int, folder: Path) -> dict[str, float]:
    """SFT from the base model, and what it can do on held-out rows."""
    begun = time.perf_counter()
    rows = task.rows(options.rows + options.test_rows, options.seed)
    args = SFTConfig(
        output_dir=str(folder),
        num_train_epochs=passes,
        learning_rate=options.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=0.1,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=16,
        max_completion_length=task.tokens,
        verifier="short_tasks:judge",
        eval_samples=options.answers,
        seed=options.seed,
        bf16=options.bf16,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
    )
    trainer = SFTTrainer(
        load_model(options.model, dtype=torch.bfloat16),
        args,
        Dataset.from_list(rows[: options.rows]),
        Dataset.from_list(rows[options.rows :]),
        processing_class=load_tokenizer(options.model),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    trained = time.perf_counter() - begun
    assert trainer.evaluation_set is not None
    with trainer.compute_loss_context_manager():
        found = trainer.evaluation(trainer.evaluation_set, greedy=True)
    if options.show:
        assert found.sampled is not None
        for row, answers in zip(rows[options.rows : options.rows + 4], found.sampled.texts[:4], strict=True):
            print(repr(row["prompt"]), [(answer, judge(answer, row)) for answer in answers[:4]], flush=True)
    return {"training_seconds": trained, "seconds": time.perf_counter() - begun, **summary(found)}


def table(found: Mapping[str, Mapping[str, Mapping[str, float]]], passes: Sequence[int]) -> Table:
    """Score at temperature 1, greedy, best of all and different right answers, by task and passes."""
    view = Table(title="score at T = 1 ± standard error over rows | greedy | best of all | different right answers")
    for column in ("task", *(f"{number} passes" for number in sorted(passes))):
        view.add_column(column)
    for name, cells in found.items():
        view.add_row(
            name,
            *(
                "{mean:.2f} ± {error:.2f} | {greedy:.2f} | {oracle:.2f} | {distinct:.1f}".format(**cells[str(number)])
                if str(number) in cells
                else "–"
                for number in sorted(passes)
            ),
        )
    return view


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--passes", type=int, nargs="+", default=[3, 12, 6], help="In this order.")
    parser.add_argument("--rows", type=int, default=128, help="Demonstrations.")
    parser.add_argument("--test_rows", type=int, default=40)
    parser.add_argument("--answers", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=100)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--show", action="store_true")
    parser.add_argument("--output_dir", required=True)
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    found: dict[str, dict[str, Any]] = {}
    for name in options.tasks:
        path = Path(options.output_dir) / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        cells = found[name] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        for passes in options.passes:
            hopeless = cells and not any(0.02 <= cell["mean"] <= 0.95 for cell in cells.values())
            if str(passes) not in cells and not hopeless:
                cells[str(passes)] = train(options, TASKS[name], passes, path.parent / "run")
                write_json(path, cells)
                print(name, passes, cells[str(passes)], flush=True)
    Console(width=160).print(table(found, options.passes))


if __name__ == "__main__":
    main()
