"""Does a reward learned from chosen answers alone rank preference pairs it never saw?

    python examples/reward_accuracy.py --model MODEL --data hh_harmless_pairs.jsonl.gz --seeds 0 1 --output_dir OUT

For each seed, runs SFT on the chosen answers of some pairs. Then, all from its checkpoint, compares rewards that never see a
rejected answer:

* ``explicit``: a reward model trained on chosen answers vs. the SFT policy's own samples;
* ``sft``, ``irft``, ``spin``: the implicit reward log π/π_base of the policy;

with the ceiling, ``preference pairs``: the same reward model trained on the true pairs of the same rows. Only rows with a
short prompt are used. Rewrites OUT/reward_accuracy.json after each seed.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from rich.console import Console
from rich.table import Table

from tutelage.algorithms import IRFTConfig, IRFTTrainer, SFTConfig, SFTTrainer, SPINConfig, SPINTrainer
from tutelage.cli.progress import TerminalProgress
from tutelage.data import (
    Tokenization,
    group_from_row,
    load_dataset,
    preference_group_from_row,
    tokenize_dataset,
)
from tutelage.evaluation.policy import ranking
from tutelage.evaluation.statistics import mean_interval
from tutelage.files import write_json
from tutelage.groups import Group
from tutelage.models.loading import load_model, load_tokenizer
from tutelage.rewards import ExplicitReward, ImplicitReward, Reward
from tutelage.rewards.comparisons import contrast
from tutelage.rewards.fitting import RewardFitter, RewardObjective
from tutelage.sampling import SamplingParams, TransformersSampler

LENGTH = 48


def mixed_precision() -> torch.autocast:
    """The precision that the trainers compute in."""
    return torch.autocast("cpu", torch.bfloat16)


def ranked(reward: Reward, pairs: list[Group]) -> list[float]:
    """Per pair: 1 if the preferred answer has the higher reward, 0.5 for a tie, else 0."""
    with mixed_precision():
        return ranking(reward, pairs)


def fitted(start: str, groups: list[Group], options: argparse.Namespace, seed: int) -> ExplicitReward:
    """A reward model that shares the SFT policy's base, trained for some passes over the groups."""
    torch.manual_seed(seed)
    model = load_model(start, dtype=torch.bfloat16)
    reward = ExplicitReward.fresh(model, shared=True, autocast=mixed_precision)
    fitter = RewardFitter(
        reward,
        RewardObjective(centering=0.01),
        torch.optim.AdamW(reward.parameters, lr=options.reward_learning_rate, weight_decay=0.0),
        batch_size=8,
        seed=seed,
    )
    for done in range(options.passes):
        print(f"  pass {done}: {fitter.fit(groups, phase=done)}", flush=True)
    return reward


def run_seed(options: argparse.Namespace, seed: int, console: Console) -> dict[str, Any]:
    """Accuracy on the held-out pairs, by reward; one value per pair."""
    out = Path(options.output_dir) / f"seed-{seed}"
    tokenizer = load_tokenizer(options.model)
    tokenization = Tokenization(tokenizer, options.max_prompt_length, LENGTH, "drop")
    data = load_dataset(options.data)
    rows = [
        row
        for row in tokenize_dataset(data, tokenization, source=options.data)
        if preference_group_from_row(row) is not None  # type: ignore[arg-type]
    ]
    order = np.random.default_rng(seed).permutation(len(rows))
    train = [rows[i] for i in order[: options.train_rows]]  # type: ignore[index]
    test = [rows[i] for i in order[options.train_rows : options.train_rows + options.test_rows]]
    pairs = [preference_group_from_row(row) for row in test]
    raw = data.select(sorted(row["row"] for row in train))
    found = {}
    settings = {"per_device_train_batch_size": 8, "num_train_epochs": 1, "warmup_steps": 0.1, "save_strategy": "no"}
    lengths = {"max_prompt_length": options.max_prompt_length, "max_completion_length": LENGTH}
    for name, config, trainer_class, more in (
        ("sft", SFTConfig, SFTTrainer, {}),
        ("irft", IRFTConfig, IRFTTrainer, {"num_samples": options.num_samples}),
        ("spin", SPINConfig, SPINTrainer, {"num_samples": options.num_samples}),
    ):
        if name not in ("sft", *options.implicit):
            continue
        with TerminalProgress(console, f"seed {seed} {name}") as progress:
            trainer = trainer_class(
                load_model(options.model if name == "sft" else str(out / "sft"), dtype=torch.bfloat16),
                config(output_dir=str(out / name), seed=seed, disable_tqdm=True, **settings, **lengths, **more),
                raw,
                processing_class=tokenizer,
                peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
                if name == "sft"
                else None,
                progress=progress,
            )
            trainer.train()
            trainer.export(out / name)
        found[name] = ranked(ImplicitReward(trainer.policy), pairs)  # type: ignore[arg-type]
        console.print(f"seed {seed} {name}: {np.mean(found[name]):.3f}", highlight=False)
        del trainer
    policy = load_model(str(out / "sft"), dtype=torch.bfloat16).eval()
    demonstrations = [group_from_row(row) for row in train]
    with torch.no_grad(), mixed_precision():
        drawn = TransformersSampler(policy, batch_size=64, pad_token_id=tokenization.pad_id).sample(
            [group.prompt_ids for group in demonstrations],
            SamplingParams(LENGTH, tokenization.stop_ids(False), seed=seed),
            num_samples=options.num_samples,
        )
    groups = [
        replace(group, completions=(*group.completions, *(sample.completion for sample in samples)))
        for group, samples in zip(demonstrations, drawn, strict=True)
    ]
    del policy
    contrasts = [pair for group in groups for pair in contrast(group, "floor")]
    true_pairs = [preference_group_from_row(row) for row in train]
    for name, training in (("explicit", contrasts), ("preference pairs", true_pairs)):
        found[name] = ranked(fitted(str(out / "sft"), training, options, seed), pairs)  # type: ignore[arg-type]
        console.print(f"seed {seed} {name}: {np.mean(found[name]):.3f}", highlight=False)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="The model to start from.")
    parser.add_argument("--data", required=True, help="Preference pairs: a hub name, a folder or a file.")
    parser.add_argument("--output_dir", required=True, help="Where models and results go.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--train_rows", type=int, default=256, help="Pairs to train on.")
    parser.add_argument("--test_rows", type=int, default=300, help="Held-out pairs.")
    parser.add_argument("--num_samples", type=int, default=2, help="Samples per prompt.")
    parser.add_argument("--passes", type=int, default=2, help="Passes of the explicit reward over its pairs.")
    parser.add_argument("--reward_learning_rate", type=float, default=3e-4, help="Of the explicit reward.")
    parser.add_argument("--max_prompt_length", type=int, default=80, help="Longest prompt, in tokens.")
    parser.add_argument("--implicit", nargs="*", default=["irft", "spin"], help="Methods with an implicit reward.")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    console, path = Console(width=120), Path(options.output_dir) / "reward_accuracy.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    asked = {name: value for name, value in vars(options).items() if name not in ("seeds", "output_dir")}
    stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"options": asked, "seeds": {}}
    if stored["options"] != asked:
        raise SystemExit(f"{path} holds a run with other options: {stored['options']}. Give another --output_dir.")
    found = stored["seeds"]
    for seed in options.seeds:
        if str(seed) not in found:
            found[str(seed)] = run_seed(options, seed, console)
            write_json(path, stored)
    view = Table(title=f"held-out pairs ranked right, {len(found)} seed(s)")
    for column in ("reward", "accuracy", "95% interval over pairs", "standard deviation over seeds"):
        view.add_column(column)
    for name in next(iter(found.values())):
        means = [float(np.mean(seed[name])) for seed in found.values()]
        interval = mean_interval([value for seed in found.values() for value in seed[name]])
        view.add_row(
            name,
            f"{np.mean(means):.3f}",
            f"{interval.low:.3f}–{interval.high:.3f}",
            f"{np.std(means, ddof=1):.3f}" if len(means) > 1 else "–",
        )
    console.print(view)


if __name__ == "__main__":
    main()
