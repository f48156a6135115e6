"""Does the recipe beat SFT on a real model? A task of short_tasks.py, several seeds, controls that are hard to beat.

    python examples/recipe_on_a_real_model.py --model MODEL --task arrange_16 --seeds 0 1 2 --output_dir OUT

For each seed: SFT on new demonstrations; then arms, most of them from the SFT checkpoint. The recipe and self-training also get
prompts without demonstrations. The arm ``rewards`` trains no policy: it fits rewards on several sets of features to the same
negatives and lets them pick among answers of the SFT policy. Answers to held-out rows are judged by the task's verifier,
which no arm sees.

Choose settings on the tuning seeds (100 and above, see candidate_tasks.py), and report others. Rewrites OUT/TASK.json after each arm;
start it again to continue.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from candidate_tasks import summary
from datasets import Dataset
from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from short_tasks import TASKS, Task

from tutelage.algorithms import RFTConfig, RFTTrainer, SFTConfig, SFTTrainer
from tutelage.evaluation.reward_quality import ScoredAnswers, reward_quality
from tutelage.files import write_json
from tutelage.groups import Group
from tutelage.models.loading import load_model, load_tokenizer
from tutelage.rewards.comparisons import Comparisons
from tutelage.rewards.feature_reward import FeatureReward
from tutelage.rewards.feature_sets import FeatureParts
from tutelage.rewards.hidden_features import HiddenSource

RECIPE = {
    "reward": "features",
    "reward_features": "text",
    "reward_negatives": "initial,out_of_fold",
    "fold_epochs": 12,
    "prompt_mix": 1.0,
    "reward_gate": "off",
    "keep_policy": "last",
    "stages_per_epoch": 6,
    "num_train_epochs": 2,
    "learning_rate": 2e-4 / 6,
    "beta": 0.3,
}
"""From SFT; no choice among stages, hence no validation rows: all demonstrations train."""

ARMS: dict[str, tuple[str, str, Mapping[str, Any]]] = {
    # name: (algorithm, what it starts from, settings)
    "sft": ("sft", "base", {}),
    "plateau": ("sft", "base", {}),
    "gentle": ("sft", "base", {"learning_rate": 2e-5}),
    "continued": ("sft", "sft", {"learning_rate": 1e-4}),
    "self-training": ("rft", "sft", {**RECIPE, "reward": "logp", "policy_update": "best_of_n"}),
    "recipe": ("rft", "sft", RECIPE),
    "recipe-best-of-n": ("rft", "sft", {**RECIPE, "policy_update": "best_of_n"}),
}
"""Every arm of an algorithm has the settings here, over those of ``common``."""

PASSES = {"sft": 1, "plateau": 2, "gentle": 2, "continued": 1}
"""Passes of an arm of SFT over the demonstrations, in units of --passes."""

SETS = ("text", "hidden", "text,logp", "hidden,logp")


def common(task: Task, seed: int, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Settings of all arms."""
    return {
        "output_dir": str(folder),
        "seed": seed,
        "learning_rate": 2e-4,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0.1,
        "per_device_eval_batch_size": 16,
        "max_completion_length": task.tokens,
        "verifier": "short_tasks:judge",
        "eval_samples": options.answers,
        "bf16": options.bf16,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_strategy": "no",
    }


class Seed:
    """The data of a seed, and what its arms found.

    Args:
        found: by arm; added to.
    """

    def __init__(self, options: argparse.Namespace, seed: int, found: dict[str, Any]):
        self.options, self.seed, self.found = options, seed, found
        self.task = TASKS[options.task]
        counts = (options.rows, options.prompts, options.test_rows)
        rows = iter(self.task.rows(sum(counts), seed))
        self.train, prompts, self.test = (Dataset.from_list([next(rows) for _ in range(n)]) for n in counts)
        self.prompts = prompts.select_columns("prompt")
        self.folder = Path(options.output_dir) / options.task / f"seed-{seed}"

    def run(self, name: str, overrides: Mapping[str, Any], label: str) -> None:
        """Train an arm, and measure it."""
        begun = time.perf_counter()
        if name == "rewards":
            self.found[label] = {"sets": self.rewards(overrides), "seconds": time.perf_counter() - begun}
            return
        trainer = self.trainer(name, overrides, label)
        trainer.train()
        if name == "sft":
            trainer.export(self.folder / "sft")
        assert trainer.evaluation_set is not None
        with trainer.compute_loss_context_manager():
            found = trainer.evaluation(trainer.evaluation_set, greedy=True)
        quality = found.reward_quality()
        self.found[label] = {
            **summary(found),
            "trained_tokens": trainer.costs.trained_tokens,
            "sampled_tokens": trainer.costs.sampled_tokens,
            "steps": trainer.state.global_step,
            "seconds": time.perf_counter() - begun,
            "reward_quality": asdict(quality) if quality else None,
        }

    def trainer(self, name: str, overrides: Mapping[str, Any], label: str) -> SFTTrainer | RFTTrainer:
        """Of an arm, with its settings and the overrides."""
        algorithm, start, settings = ARMS[name]
        own: dict[str, Any] = {"per_device_train_batch_size": 8 if algorithm == "sft" else 4}
        if name in PASSES:
            own["num_train_epochs"] = PASSES[name] * self.options.passes
        settings = {**common(self.task, self.seed, self.options, self.folder / label), **own, **settings, **overrides}
        adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        parts: dict[str, Any] = {
            "processing_class": load_tokenizer(self.options.model),
            "peft_config": adapter if start == "base" else None,
        }
        model = load_model(self.options.model if start == "base" else str(self.folder / start), dtype=torch.bfloat16)
        if algorithm == "sft":
            return SFTTrainer(model, SFTConfig(**settings), self.train, self.test, **parts)
        parts["prompt_dataset"] = self.prompts
        self._share_negatives(label)
        return RFTTrainer(model, RFTConfig(save_each_stage=False, **settings), self.train, self.test, **parts)

    def _share_negatives(self, label: str) -> None:
        """The negatives that ``rewards`` made serve the arms after it too: they do not depend on the policy phase."""
        made, wanted = (self.folder / name / "stages" / "negatives" for name in ("rewards", label))
        if made.exists() and not wanted.exists():
            shutil.copytree(made, wanted)

    def rewards(self, overrides: Mapping[str, Any]) -> dict[str, Any]:
        """By negatives and features: how a reward ranks the SFT policy's answers to the held-out rows."""
        trainer = self.trainer("recipe", overrides, "rewards")
        assert isinstance(trainer, RFTTrainer)
        assert trainer.evaluation_set is not None
        assert trainer.stages is not None
        rows, negatives = trainer.evaluation_set, trainer.stages.phase.negatives  # type: ignore[attr-defined]
        with trainer.compute_loss_context_manager():
            found = rows.evaluate(
                trainer.policy, seed=self.seed, num_samples=self.options.answers, score_samples=True
            ).sampled
        assert found is not None
        assert found.logps is not None
        assert found.scores is not None
        groups = found.added_to([group.select(()) for group in rows.groups])
        lengths = [[float(len(c.token_ids)) for c in group.completions] for group in groups]
        unpaired = self._unpaired(trainer)
        paired = negatives.groups()
        parts = FeatureParts(
            text=trainer.tokenization.text,
            hidden=HiddenSource(
                lambda: trainer.policy,
                layout=trainer.layout,
                pad_token_id=trainer.tokenization.pad_id,
                autocast=trainer.compute_loss_context_manager,
            ),
            logps=trainer.scorer.token_logps,
        )
        results: dict[str, Any] = {}
        for kinds in (("out_of_fold",), ("initial",), ("initial", "out_of_fold")):
            for names in self.options.sets:
                reward = FeatureReward.of(names, parts)
                facts = reward.fit(Comparisons({kind: paired[kind] for kind in kinds}, unpaired), seed=self.seed)
                values = zip(reward.scores(groups), found.logps, lengths, found.scores, strict=True)
                quality = reward_quality([ScoredAnswers(*row) for row in values])
                results[f"{'+'.join(kinds)} / {names}"] = {"fit": facts, **(asdict(quality) if quality else {})}
        return results

    def _unpaired(self, trainer: RFTTrainer) -> list[Group]:
        """The SFT policy's answers to the prompts without demonstrations."""
        assert trainer.stages is not None
        groups = [
            Group(trainer.tokenization.prompt_ids(prompt), row=10_000 + place)
            for place, prompt in enumerate(self.prompts["prompt"])
        ]
        return trainer.stages.rollout.draw(groups, stage=0)


def table(found: Mapping[str, Mapping[str, Any]], task: str) -> Table:
    """Means over seeds with their standard deviation, and the paired difference of the mean score from ``sft``."""
    view = Table(title=f"{task}: mean ± standard deviation over seeds")
    columns = {
        "mean": "score at T = 1",
        "greedy": "greedy",
        "oracle": "best of all",
        "distinct": "distinct right",
        "logp": "log π(demonstration)",
        "kl": "KL to start",
        "seconds": "s",
    }
    for column in ("arm", *columns.values(), "score − SFT"):
        view.add_column(column)
    names = list(dict.fromkeys(name for arms in found.values() for name in arms if not name.startswith("rewards")))
    for name in names:
        seeds = [arms for arms in found.values() if name in arms]
        row = [_spread([arms[name][key] for arms in seeds if key in arms[name]]) for key in columns]
        gain = _spread([arms[name]["mean"] - arms["sft"]["mean"] for arms in seeds])
        view.add_row(f"{name} ({len(seeds)})", *row, gain)
    return view


def _spread(values: list[float]) -> str:
    if not values:
        return "–"
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1) if len(values) > 1 else 0.0:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="The model to start from.")
    parser.add_argument("--task", choices=TASKS, default="arrange_16")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", type=int, default=64, help="Demonstrations.")
    parser.add_argument(
        "--passes", type=int, default=24, help="Of SFT; the arms plateau and gentle make twice as many."
    )
    parser.add_argument("--prompts", type=int, default=240, help="Prompts without demonstrations.")
    parser.add_argument("--test_rows", type=int, default=48, help="Held-out rows.")
    parser.add_argument("--answers", type=int, default=8, help="Sampled answers per held-out row.")
    parser.add_argument("--arms", nargs="+", default=["rewards", *list(ARMS)[1:]], choices=["rewards", *ARMS])
    parser.add_argument("--sets", nargs="+", default=SETS, help="Sets of features that the arm rewards compares.")
    parser.add_argument("--settings", default="{}", help='JSON by arm, for example {"recipe": {"beta": 0.1}}.')
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--output_dir", required=True, help="Where models and results go.")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    path = Path(options.output_dir) / f"{options.task}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    counts = {name: getattr(options, name) for name in ("rows", "passes", "prompts", "test_rows", "answers")}
    stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"counts": counts, "seeds": {}}
    if stored["counts"] != counts:
        raise SystemExit(f"{path} holds runs of other sizes: {stored['counts']}. Give another --output_dir.")
    settings = json.loads(options.settings)
    for number in options.seeds:
        seed = Seed(options, number, stored["seeds"].setdefault(str(number), {}))
        for name in ["sft", *options.arms]:
            overrides = settings.get(name, {})
            label = " ".join([name, *(f"{key}={value}" for key, value in overrides.items())])
            if label not in seed.found:
                seed.run(name, overrides, label)
                write_json(path, stored)
                print(number, label, json.dumps(seed.found[label])[:600], flush=True)
    Console(width=160).print(table(stored["seeds"], options.task))


if __name__ == "__main__":
    main()
