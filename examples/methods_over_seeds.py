"""Does RFT beat continued SFT, SPIN and IRFT, and does its reward pick better answers? One task, several seeds.

    python examples/methods_over_seeds.py --model MODEL --task chain_sum --seeds 0 1 2 3 4 --output_dir OUT

For each seed: draw new rows of a reasoning-gym task, run SFT, and run each method from the SFT checkpoint. All methods see
the same demonstrations; SPIN, IRFT and RFT draw the same number of samples per prompt. Costs are equal where possible, and the
table shows them. Answers to held-out rows are sampled at temperature 1 and judged by the task's verifier, which no method
sees. Best of n: of n answers of the SFT policy to each held-out row, the one with the highest reward under RFT's reward.

Rewrites OUT/TASK.json after each run. Start it again to continue from that file, also with more seeds or methods.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from rich.console import Console
from rich.table import Table

from tutelage.algorithms import (
    IRFTConfig,
    IRFTTrainer,
    RFTConfig,
    RFTTrainer,
    SFTConfig,
    SFTTrainer,
    SPINConfig,
    SPINTrainer,
)
from tutelage.cli.progress import TerminalProgress
from tutelage.evaluation.policy import EvaluationSet
from tutelage.evaluation.verifiers import reasoning_gym_rows
from tutelage.files import write_json
from tutelage.groups import Group
from tutelage.models.loading import load_model, load_tokenizer
from tutelage.sampling import SamplingParams, TransformersSampler

TASKS = {
    "chain_sum": ({"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2}, 16),
    "word_sequence_reversal": ({"min_words": 5, "max_words": 6}, 24),
}


# RFT as it was when docs/results.md was written: a neural reward on the policy's own samples.
_NEURAL_RFT = {
    "reward": "model",
    "reward_negatives": "own",
    "reward_gate": "chance",
    "reward_scaling": "down_only",
    "reward_replay_stages": 0,
    "reward_warmup_stages": 1,
    "samplings_per_stage": 1,
    "gradient_accumulation_steps": 1,
    "warmup_steps": 0,
    "lr_scheduler_type": "constant",
    "beta": 0.1,
    "learning_rate": 5e-6,
}


def methods(num_samples: int) -> dict[str, tuple[type, type, dict[str, Any]]]:
    """Config, trainer and settings of each run; every run but the first starts from the first one's checkpoint."""
    return {
        "sft": (SFTConfig, SFTTrainer, {"num_train_epochs": 3}),
        "continued-sft": (SFTConfig, SFTTrainer, {"learning_rate": 1e-4}),
        "spin": (SPINConfig, SPINTrainer, {"num_samples": num_samples}),
        "irft": (IRFTConfig, IRFTTrainer, {"num_samples": num_samples}),
        "rft": (RFTConfig, RFTTrainer, {"num_samples": num_samples, "per_device_train_batch_size": 2, **_NEURAL_RFT}),
    }


def task_rows(task: str, seed: int, train: int, test: int) -> tuple[Dataset, Dataset]:
    """Training and held-out rows without a prompt in common."""
    made = reasoning_gym_rows(task, 8 * (train + test), seed, **TASKS[task][0])
    rows = list({row["prompt"]: row for row in made}.values())[: train + test]
    assert len(rows) == train + test, f"{task} gave {len(rows)} different prompts"
    return Dataset.from_list(rows[:train]), Dataset.from_list(rows[train:])


def run_seed(
    options: argparse.Namespace, seed: int, found: dict[str, Any], console: Console, save: Callable[[], None]
) -> None:
    """Run every method that ``found`` lacks at one seed; adds its scores and costs to ``found``."""
    folder = Path(options.output_dir) / options.task / f"seed-{seed}"
    train, test = task_rows(options.task, seed, options.rows, options.test_rows)
    tokenizer = load_tokenizer(options.model)
    for name, (config, trainer_class, settings) in methods(options.num_samples).items():
        if name in found or name not in ("sft", *options.methods):
            continue
        overrides = json.loads(options.settings).get(name, {})
        args = config(
            output_dir=str(folder / name),
            seed=seed,
            per_device_eval_batch_size=16,
            max_completion_length=TASKS[options.task][1],
            verifier=f"reasoning_gym:{options.task}",
            warmup_steps=0.1,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **({"num_train_epochs": 1, "per_device_train_batch_size": 16} | settings | overrides),
        )
        start = options.model if name == "sft" else str(folder / "sft")
        adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        with TerminalProgress(console, f"seed {seed} {name}") as progress:
            trainer = trainer_class(
                load_model(start, dtype=torch.bfloat16),
                args,
                train,
                test,
                processing_class=tokenizer,
                peft_config=adapter if name == "sft" else None,
                progress=progress,
            )
            trainer.train()
            if name == "sft":
                trainer.export(folder / name)
            rows = trainer.evaluation_set
            assert rows is not None
            metrics = trainer.evaluation(rows, sample=False).metrics()
            scores, _ = answers(trainer, rows, options.answers)
            found[name] = {
                "sampled": float((scores >= 1).mean()),
                "demonstration_logp": metrics["demonstration_logp"],
                "trained_tokens": trainer.costs.trained_tokens,
                "sampled_tokens": trainer.costs.sampled_tokens,
                "seconds": sum(trainer.costs.seconds.values()),
            }
            if isinstance(trainer, RFTTrainer):
                found[name]["selection"] = trainer.record(name=name).selection
                found[name]["history"] = [line for line in trainer.state.log_history if "reward/gap" in line]
                found["best_of_n"] = best_of_n(trainer, rows, options.best_of)
            save()
            console.print(f"seed {seed} {name}: {found[name]['sampled']:.3f} sampled", highlight=False)


def answers(trainer: Any, rows: EvaluationSet, n: int) -> tuple[np.ndarray, list[Group]]:
    """Verifier scores [rows, n] of n answers of the trainer's policy to each held-out row, and the answers themselves."""
    tokenization = rows.tokenization
    sampler = TransformersSampler(trainer.policy, batch_size=64, pad_token_id=tokenization.pad_id)
    params = SamplingParams(trainer.args.max_completion_length, tokenization.stop_ids(False), seed=10_000)
    with trainer.compute_loss_context_manager():
        drawn = sampler.sample([group.prompt_ids for group in rows.groups], params, num_samples=n)
    groups = [
        replace(group, completions=tuple(sample.completion for sample in samples))
        for group, samples in zip(rows.groups, drawn, strict=True)
    ]
    scores = np.array([[rows.verify(i, c.token_ids) for c in group.completions] for i, group in enumerate(groups)])
    return scores, groups


def best_of_n(trainer: RFTTrainer, rows: EvaluationSet, n: int) -> dict[str, float]:
    """Of n answers of the SFT policy: fraction that is right, of rows where the reward picks a right one, and where one exists."""
    assert trainer.initial is not None
    with trainer.initial.active():
        scores, groups = answers(trainer, rows, n)
    rewards = np.array(trainer.reward.scores(groups))
    right = scores >= 1
    pairs = [
        (np.sign(a - b) + 1) / 2
        for reward, good in zip(rewards, right, strict=True)
        for a in reward[good]
        for b in reward[~good]
    ]
    return {
        "mean": float(right.mean()),
        "picked": float(right[np.arange(len(right)), rewards.argmax(1)].mean()),
        "oracle": float(right.any(1).mean()),
        "right_over_wrong": float(np.mean(pairs)) if pairs else 0.5,
    }


def table(found: dict[str, dict[str, Any]], task: str) -> Table:
    """Means over seeds with their standard deviation, and the paired difference from continued SFT."""
    view = Table(title=f"{task}: mean ± standard deviation over seeds")
    for column in (
        "run",
        "accuracy",
        "accuracy − continued SFT",
        "held-out log π(demonstration), nats",
        "trained tokens",
        "sampled tokens",
        "s",
    ):
        view.add_column(column)
    names = list(dict.fromkeys(name for seed in found.values() for name in seed if name != "best_of_n"))
    for name in names:
        seeds = [seed for seed in found.values() if name in seed]
        runs = [seed[name] for seed in seeds]
        control = [seed.get("continued-sft", seed["sft"])["sampled"] for seed in seeds]
        difference = [run["sampled"] - other for run, other in zip(runs, control, strict=True)]
        view.add_row(
            f"{name} ({len(runs)} seeds)",
            spread([run["sampled"] for run in runs]),
            spread(difference),
            spread([run["demonstration_logp"] for run in runs]),
            *(
                f"{np.mean([run[key] for run in runs]):,.0f}"
                for key in ("trained_tokens", "sampled_tokens", "seconds")
            ),
        )
    return view


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation."""
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1) if len(values) > 1 else 0.0:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="The model to start from.")
    parser.add_argument("--task", choices=TASKS, default="chain_sum", help="A reasoning-gym task.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument(
        "--rows", type=int, default=256, help="Demonstrations. RFT uses a tenth, at least 16, as validation rows."
    )
    parser.add_argument("--test_rows", type=int, default=100, help="Held-out rows.")
    parser.add_argument("--num_samples", type=int, default=4, help="Samples per prompt for SPIN, IRFT and RFT.")
    parser.add_argument(
        "--answers", type=int, default=2, help="Sampled answers per held-out row; accuracy is their mean."
    )
    parser.add_argument("--best_of", type=int, default=8, help="n of best of n.")
    parser.add_argument("--methods", nargs="+", default=["continued-sft", "spin", "irft", "rft"])
    parser.add_argument(
        "--settings", default="{}", help='JSON: settings by method, for example {"rft": {"beta": 0.2}}.'
    )
    parser.add_argument("--output_dir", required=True, help="Where models and results go.")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    console = Console(width=140)
    path = Path(options.output_dir) / f"{options.task}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    asked = {name: getattr(options, name) for name in ("rows", "test_rows", "num_samples", "answers", "settings")}
    stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"options": asked, "seeds": {}}
    if stored["options"] != asked:
        raise SystemExit(f"{path} holds a run with other options: {stored['options']}. Give another --output_dir.")
    found = stored["seeds"]
    for seed in options.seeds:
        run_seed(options, seed, found.setdefault(str(seed), {}), console, lambda: write_json(path, stored))
    console.print(table(found, options.task))
    picks = [seed["best_of_n"] for seed in found.values() if "best_of_n" in seed]
    if picks:
        console.print(
            f"best of {options.best_of}: "
            + ", ".join(f"{key} {spread([pick[key] for pick in picks])}" for key in picks[0]),
            highlight=False,
        )


if __name__ == "__main__":
    main()
