"""Does a reward learned from demonstrations alone rank answers it never saw? (Li et al. 2024, Figure 1, right)

Trains on the preferred answers of preference pairs and never shows the rejected ones. Then measures on held-out pairs how
well the log-prob and the implicit reward separate the preferred answer from the rejected one.

    python examples/figure_1.py --model MODEL --data pairs.jsonl.gz --output_dir OUT

Runs SFT, then one more pass of IRFT, SPIN and continued SFT from its checkpoint. Rewrites OUT/figure_1.json after each run.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig
from rich.console import Console
from rich.table import Table

from tutelage.algorithms import IRFTConfig, IRFTTrainer, SFTConfig, SFTTrainer, SPINConfig, SPINTrainer
from tutelage.cli.progress import LogLines, TerminalProgress
from tutelage.data import load_dataset
from tutelage.evaluation.policy import EvaluationSet
from tutelage.evaluation.statistics import mean_interval
from tutelage.models.loading import load_model, load_tokenizer
from tutelage.results import write_results

METHODS = {
    "sft": (SFTConfig, SFTTrainer, {}),
    "irft": (IRFTConfig, IRFTTrainer, {"learning_rate": 5e-5, "stages_per_epoch": 5}),
    "spin": (SPINConfig, SPINTrainer, {"learning_rate": 5e-5}),
    "continued-sft": (SFTConfig, SFTTrainer, {"learning_rate": 1e-4}),
}


def pair_logps(model, rows: EvaluationSet) -> tuple[np.ndarray, list[float]]:
    """[pairs, 2] log π of preferred and rejected answers, and log π of each held-out demonstration (nats per sequence)."""
    found = rows.evaluate(model, sample=False)
    assert found.preference_logps is not None
    return found.preference_logps, found.demonstration_logps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="The model to start from.")
    parser.add_argument("--data", required=True, help="Preference pairs: a hub name, a folder or a file.")
    parser.add_argument("--output_dir", required=True, help="Where models and results go.")
    parser.add_argument("--train_rows", type=int, default=1200, help="Pairs to train on, from the start of the data.")
    parser.add_argument("--test_rows", type=int, default=300, help="Held-out pairs, from the end of the data.")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    out, console = Path(options.output_dir), Console()
    data = load_dataset(options.data)
    train, test = data.select(range(options.train_rows)), data.select(range(len(data) - options.test_rows, len(data)))
    tokenizer = load_tokenizer(options.model)
    logps, demonstrations, rows = {}, {}, None
    for name, (config, trainer_class, settings) in METHODS.items():
        args = config(
            output_dir=str(out / name),
            seed=options.seed,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=4,
            num_train_epochs=1,
            warmup_steps=0.1,
            max_prompt_length=1024,
            max_completion_length=64,
            logging_steps=5,
            save_strategy="no",
            disable_tqdm=True,
            **settings,
        )
        start = options.model if name == "sft" else str(out / "sft")
        model = load_model(start, dtype=torch.bfloat16)
        if rows is None:
            rows = EvaluationSet.of(test, args.tokenization(tokenizer), source=options.data)
            logps["start"], demonstrations["start"] = pair_logps(model, rows)
        with TerminalProgress(console, name) as progress:
            trainer = trainer_class(
                model,
                args,
                train_dataset=train,
                processing_class=tokenizer,
                peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear") if name == "sft" else None,
                callbacks=[LogLines(console)],
                progress=progress,
                source=options.data,
            )
            trainer.train()
        trainer.save_model(str(out / name))
        logps[name], demonstrations[name] = pair_logps(trainer.model, rows)
        write_results(out / name, trainer.record(name=name))
        show(logps, demonstrations, out / "figure_1.json", console)


def show(logps: dict[str, np.ndarray], demonstrations: dict[str, list[float]], path: Path, console: Console) -> None:
    """Print the table and write its numbers to ``path``. Rewards are log π/π_0 in nats; π_0 is the start or the SFT model."""
    table = Table("model", "log π(chosen) − log π(rejected)", "ranked by log π", "by reward, π_0 = start", "π_0 = SFT")
    table.add_column("held-out log π(demo)")
    found = {}
    for name, values in logps.items():
        gap = values[:, 0] - values[:, 1]
        columns = {"gap": gap, "logp_accuracy": gap > 0}
        for reference in ("start", "sft"):
            difference = values - logps[reference]
            reward_gap = difference[:, 0] - difference[:, 1]
            columns |= {f"reward_accuracy_{reference}": reward_gap > 0, f"reward_gap_{reference}": reward_gap}
        columns["demonstration_logp"] = demonstrations[name]
        found[name] = {key: mean_interval(np.asarray(v, dtype=float).tolist()).to_dict() for key, v in columns.items()}
        cell = {key: f"{v['mean']:.3f} ({v['low']:.3f} to {v['high']:.3f})" for key, v in found[name].items()}
        table.add_row(
            name,
            cell["gap"],
            cell["logp_accuracy"],
            "—" if name == "start" else cell["reward_accuracy_start"],
            "—" if name in ("start", "sft") else cell["reward_accuracy_sft"],
            cell["demonstration_logp"],
        )
    console.print(table)
    path.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
