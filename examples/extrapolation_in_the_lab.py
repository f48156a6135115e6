"""When does it help to go on along the way from SFT to a trained policy? ExPO in a planted world, beside a random direction.

    python examples/extrapolation_in_the_lab.py --world arrange --seeds 61 62 63 64 65 66 --output_dir OUT

For each seed: SFT gives θ₀. From it the recipe (RFT on features) gives θ₁ twice, with all its steps at a small learning rate
(``under``: the policy hardly moves) and at the tuned one (``well``). Then θ₁ + α(θ₁ − θ₀) and θ₁ + α·d are measured on test rows,
where d is a random direction with the norm of θ₁ − θ₀ in each tensor. α is also chosen by score on validation rows.

Rewrites OUT/WORLD.json after each seed. Start it again to go on from that file, also with more seeds. A seed takes two to four
minutes on a core.
"""

from __future__ import annotations

import argparse
import copy
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from tutelage.files import read_json, write_json
from tutelage.lab.base import BaseModel, base_folder
from tutelage.lab.definitions import Run
from tutelage.lab.measures import measure
from tutelage.lab.mixture import retention_rows
from tutelage.lab.running import execute
from tutelage.lab.worlds import World, WorldOptions
from tutelage.models.extrapolation.arithmetic import extrapolated

ALPHAS = (-0.5, 0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
SFT = {"learning_rate": 1e-3, "num_train_epochs": 40}
TRAINED = {"under": 0.02, "well": 0.5}  # learning rates of the policy phase, as shares of SFT's
RECIPE = {
    "num_train_epochs": 1,
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 1,
    "num_samples": 4,
    "stages_per_epoch": 8,
    "reward": "features",
    "reward_features": "text",
    "reward_negatives": "own,initial,out_of_fold",
    "reward_scaling": "spread",
    "reward_gate": "off",
    "keep_policy": "last",
    "policy_update": "gradient",
    "beta": 0.05,
    "base_model_name_or_path": "{base}",
    "fold_epochs": SFT["num_train_epochs"],
    "fold_learning_rate": SFT["learning_rate"],
    "fold_batch_size": 16,
}
SHOWN = ("score", "score_greedy", "demonstration_logp", "kl", "length")


def random_direction(aligned: Mapping[str, Tensor], start: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """A normal direction with the norm of θ₁ − θ₀ in each tensor."""
    found = {}
    for name, weight in aligned.items():
        generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
        direction = torch.randn(weight.shape, generator=generator)
        found[name] = direction * ((weight - start[name]).norm() / direction.norm())
    return found


def run_seed(world: str, seed: int, weights: Path) -> list[dict[str, Any]]:
    """Train, extrapolate and measure with one seed; a dict per policy and α."""
    options = WorldOptions(demonstrations=48 if world == "reverse" else 128)
    sft = Run(world, options, seed, "reporting", "sft", SFT)
    runs = {
        name: Run(
            world,
            options,
            seed,
            "reporting",
            "rft",
            {**RECIPE, "learning_rate": share * SFT["learning_rate"]},
            start=sft,
            takes_prompts=True,
        )
        for name, share in TRAINED.items()
    }
    state = {}
    for name, run in {"start": sft, **runs}.items():
        path = weights / f"{run.name}.safetensors"
        if not path.exists():
            execute(run, weights)
        state[name] = load_file(path)
    folder = base_folder(BaseModel())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    made = World(world, seed, "reporting", options)
    start = _with(AutoModelForCausalLM.from_pretrained(folder), state["start"])
    kept = retention_rows(16, seed)
    found = []
    for name in TRAINED:
        direction = random_direction(state[name], state["start"], seed)
        for alpha in ALPHAS:
            policies = {
                "trained": {
                    key: extrapolated(value, state["start"][key], alpha) for key, value in state[name].items()
                },
                "random": {key: value + alpha * direction[key] for key, value in state[name].items()},
            }
            for way, weight in policies.items():
                policy = _with(start, weight)
                line = {"seed": seed, "policy": name, "direction": way, "alpha": alpha}
                for role, rows in (("validation", made.validation()), ("test", made.test())):
                    measured = measure(policy, start, tokenizer, made, rows, kept)
                    line[role] = {key: getattr(measured, key) for key in SHOWN}
                found.append(line)
    of_start = measure(start, start, tokenizer, made, made.test(), kept)
    line = {"seed": seed, "policy": "start", "direction": "", "alpha": None}
    return [*found, {**line, "test": {key: getattr(of_start, key) for key in SHOWN}}]


def _with(model: Any, state: Mapping[str, Tensor]) -> Any:
    made = copy.deepcopy(model)
    made.load_state_dict(state)
    return made.eval()


def shown(lines: Sequence[Mapping[str, Any]], world: str) -> list[Table]:
    """Mean ± standard deviation over seeds, a table per policy and direction, and α as validation rows choose it."""
    seeds = sorted({line["seed"] for line in lines})
    tables = []
    for policy, way in (("start", ""), *((policy, way) for policy in TRAINED for way in ("trained", "random"))):
        rows = [line for line in lines if line["policy"] == policy and line["direction"] == way]
        table = Table(title=f"{world}, {len(seeds)} seeds: {policy} {way}", title_justify="left")
        for heading in ("α", *SHOWN, "score over that at α = 0", "higher in"):
            table.add_column(heading, justify="right", no_wrap=True)
        plain = [line["test"]["score"] for line in rows if line["alpha"] == 0]
        for alpha in dict.fromkeys(line["alpha"] for line in rows):
            at = [line["test"] for line in rows if line["alpha"] == alpha]
            gains = np.subtract([each["score"] for each in at], plain) if alpha else None
            table.add_row(
                "–" if alpha is None else f"{alpha:g}",
                *(told([each[key] for each in at]) for key in SHOWN),
                *(("", "") if gains is None else (told(gains), f"{(gains > 0).sum()} of {len(gains)}")),
            )
        tables.append(table)
    table = Table(title="α chosen by score on validation rows; score on test rows", title_justify="left")
    for heading in ("policy", "direction", "α, by seed", "score at α = 0", "score at the chosen α", "difference"):
        table.add_column(heading, justify="right", no_wrap=True)
    for policy in TRAINED:
        for way in ("trained", "random"):
            chosen, plain = [], []
            for seed in seeds:
                own = [
                    line
                    for line in lines
                    if (line["seed"], line["policy"], line["direction"]) == (seed, policy, way) and line["alpha"] >= 0
                ]
                chosen.append(max(own, key=lambda line: line["validation"]["score"]))
                plain.append(next(line for line in own if line["alpha"] == 0))
            scores = [[line["test"]["score"] for line in each] for each in (plain, chosen)]
            differences = np.subtract(scores[1], scores[0])
            alphas = " ".join(f"{line['alpha']:g}" for line in chosen)
            table.add_row(policy, way, alphas, told(scores[0]), told(scores[1]), told(differences))
    return [*tables, table]


def told(values: Sequence[float] | np.ndarray) -> str:
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else f"{values[0]:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", default="arrange", choices=["arrange", "navigate", "reverse", "compose"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[61, 62, 63, 64, 65, 66])
    parser.add_argument("--output_dir", required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)  # products of a tiny model
    folder = Path(options.output_dir)
    (folder / "weights").mkdir(parents=True, exist_ok=True)
    path = folder / f"{options.world}.json"
    lines = read_json(path) if path.exists() else []
    for seed in options.seeds:
        if seed not in {line["seed"] for line in lines}:
            lines += run_seed(options.world, seed, folder / "weights")
            write_json(path, lines)
    console = Console(width=160)
    for table in shown([line for line in lines if line["seed"] in options.seeds], options.world):
        console.print(table)


if __name__ == "__main__":
    main()
