"""Does a demonstration in the prompt help the model? It is what self-distillation (``tutelage sdft``) stands on.

    python examples/teacher_in_context.py --seeds 1 2 3 --output OUT.json

In the planted worlds of the laboratory, of the base model and of the model after SFT: the score of samples at temperature 1 for
test prompts, after the prompt alone (as the student sees it) and after a prompt with a right answer in it (as the teacher does);
how many of the teacher's samples are copies of that answer; and the log-prob of another right answer under both views, in nats per
sequence. A teacher whose samples score no better than the student's has nothing to teach.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tutelage.data import Tokenization
from tutelage.data.teacher_prompt import TeacherPrompt
from tutelage.files import write_json
from tutelage.groups import Completion, Group, Role
from tutelage.lab.base import BaseModel, base_folder
from tutelage.lab.definitions import Run
from tutelage.lab.running import execute
from tutelage.lab.worlds import Row, World, WorldOptions
from tutelage.lab.worlds.task import generator
from tutelage.sampling import SamplingParams, TransformersSampler
from tutelage.scoring.logps import cached_logps

# The words that the worlds' tokenizer has: the row before the prompt, as another row would be; and the answer alone.
TEMPLATES = {
    "row": "{prompt} {demonstration} {prompt}",
    "answer": "{demonstration} {prompt}",
    "copy": "copy {demonstration} : {demonstration} {prompt}",
}
SFT = {  # at its best for samples at temperature 1, by docs/lab.md: rate, passes, demonstrations
    "arrange": (1e-3, 20, 128),
    "navigate": (1e-3, 80, 128),
    "compose": (2e-3, 80, 128),
    "reverse": (3e-4, 80, 48),
}
NUM_SAMPLES = 8


def findings(
    policy: PreTrainedModel, tokenization: Tokenization, world: World, seed: int
) -> dict[str, dict[str, float]]:
    """What the student's view and each template give, by name."""
    rows, rng = world.test(), generator("teacher-in-context", world.name, seed)
    others = [world.task.answer(row.content, rng) for row in rows]
    views = {"student": [tokenization.prompt_ids(row.text) for row in rows]}
    for name, template in TEMPLATES.items():
        seen = TeacherPrompt(template, 99)
        views[name] = [tokenization.prompt_ids(seen.of(row.text, " ".join(row.answer))) for row in rows]
    return {name: _finding(policy, tokenization, world, rows, others, prompts) for name, prompts in views.items()}


def _finding(
    policy: PreTrainedModel,
    tokenization: Tokenization,
    world: World,
    rows: Sequence[Row],
    others: Sequence[tuple[str, ...]],
    prompts: Sequence[tuple[int, ...]],
) -> dict[str, float]:
    sampler = TransformersSampler(policy, batch_size=512, pad_token_id=tokenization.pad_id)
    params = SamplingParams(tokenization.max_completion_length, tokenization.stop_ids(False))
    drawn = sampler.sample(prompts, params, num_samples=NUM_SAMPLES)
    scores, copies = [], []
    for row, samples in zip(rows, drawn, strict=True):
        for sample in samples:
            words = tuple(tokenization.text(sample.token_ids).split())
            scores.append(world.judge(row, words) if sample.finished else 0.0)
            copies.append(words == row.answer)
    answers = [
        Completion(tokenization.completion(row.text, " ".join(other), Role.DEMONSTRATION).token_ids, Role.SAMPLE, True)
        for row, other in zip(rows, others, strict=True)
    ]
    groups = [Group(prompt, (answer,)) for prompt, answer in zip(prompts, answers, strict=True)]
    logps = [logp for (logp,) in cached_logps(policy, groups, batch_size=64)]
    values = np.asarray(scores)
    return {
        "score": float(values.mean()),
        "score_without_copies": float(values[~np.asarray(copies)].mean()) if not all(copies) else float("nan"),
        "copies": float(np.mean(copies)),
        "logp_of_another": float(np.mean(logps)),
    }


def after_sft(name: str, seed: int, folder: Path) -> dict[str, Any]:
    """The weights of SFT in a world."""
    rate, passes, demonstrations = SFT[name]
    options = WorldOptions(demonstrations=demonstrations, prompts=0)
    settings = {"learning_rate": rate, "num_train_epochs": passes}
    run = Run(name, options, seed, "reporting", "sft", settings)
    execute(run, folder)
    return load_file(folder / f"{run.name}.safetensors")


def main() -> None:
    """Measure, show and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--worlds", nargs="+", choices=list(SFT), default=list(SFT))
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    base = base_folder(BaseModel())
    tokenization = Tokenization(AutoTokenizer.from_pretrained(base), 99, 14)
    found: list[dict[str, Any]] = []
    for name in options.worlds:
        for seed in options.seeds:
            policy = AutoModelForCausalLM.from_pretrained(base).eval()
            world = World(name, seed, "reporting", WorldOptions(demonstrations=SFT[name][2]))
            for model in ("base", "sft"):
                if model == "sft":
                    with tempfile.TemporaryDirectory() as folder:
                        policy.load_state_dict(after_sft(name, seed, Path(folder)))
                for view, values in findings(policy, tokenization, world, seed).items():
                    found.append({"world": name, "seed": seed, "model": model, "view": view, **values})
            write_json(options.output, found)
    _show(found)


def _show(found: Sequence[dict[str, Any]]) -> None:
    names = ("score", "score_without_copies", "copies", "logp_of_another")
    table = Table("world", "model", "view", *names)
    for key in dict.fromkeys((f["world"], f["model"], f["view"]) for f in found):
        of_key = [f for f in found if (f["world"], f["model"], f["view"]) == key]
        cells = (f"{np.mean([f[n] for f in of_key]):.3f} ± {np.std([f[n] for f in of_key]):.3f}" for n in names)
        table.add_row(*key, *cells)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
