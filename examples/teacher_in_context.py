"""Does a demonstration in the prompt help the model? It is what self-distillation (``tutelage sdft``) stands on.

    python examples/teacher_in_context.py --seeds 1 2 3 --output OUT.json
    python examples/teacher_in_context.py --model MODEL --tasks arrange_16 palindrome --output OUT.json

In the planted worlds of the laboratory, of the base model and of the model after SFT: the score of samples at temperature 1 for
test prompts, after the prompt alone (as the student sees it) and after a prompt with a right answer in it (as the teacher does);
how many of the teacher's samples are copies of that answer; and the log-prob of another right answer under both views, in nats per
sequence. A teacher whose samples score no better than the student's has nothing to teach.

With ``--model``, the same of a language model as it is, on tasks of short_tasks.py; the first line of a sample is the answer. The
template of ``tutelage sdft`` is tried beside one that shows the row as it is written.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from short_tasks import TASKS, Task
from short_tasks import judge as task_judge
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from tutelage.data import Tokenization
from tutelage.data.teacher_prompt import DEFAULT_TEMPLATE, TeacherPrompt
from tutelage.files import write_json
from tutelage.groups import Group, Role
from tutelage.lab.base import BaseModel, base_folder
from tutelage.lab.definitions import Run
from tutelage.lab.running import execute
from tutelage.lab.worlds import World, WorldOptions
from tutelage.lab.worlds.task import generator
from tutelage.models.loading import load_model, load_tokenizer
from tutelage.sampling import Sample, SamplingParams, TransformersSampler
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


def in_a_world(policy: nn.Module, tokenization: Tokenization, world: World, seed: int) -> Iterator[dict[str, Any]]:
    """What the student's view and each template give."""
    rows, rng = world.test(), generator("teacher-in-context", world.name, seed)
    others = [" ".join(world.task.answer(row.content, rng)) for row in rows]
    asked = [(row.text, " ".join(row.answer)) for row in rows]

    def judge(place: int, sample: Sample, text: str) -> float:
        return world.judge(rows[place], text.split()) if sample.finished else 0.0

    for name, prompts in views(tokenization, asked, TEMPLATES):
        yield {"view": name, **finding(policy, tokenization, prompts, asked, judge, others)}


def on_a_task(
    policy: nn.Module, tokenization: Tokenization, task: Task, seed: int, count: int
) -> Iterator[dict[str, Any]]:
    """The same on rows of a task."""
    rows = task.rows(count, seed)
    asked = [(row["prompt"], row["completion"]) for row in rows]

    def judge(place: int, sample: Sample, text: str) -> float:
        return task_judge(text.strip().split("\n")[0], rows[place])

    for name, prompts in views(
        tokenization, asked, {"default": DEFAULT_TEMPLATE, "row": "{prompt}{demonstration}\n\n{prompt}"}
    ):
        yield {"view": name, **finding(policy, tokenization, prompts, asked, judge)}


def views(
    tokenization: Tokenization, asked: Sequence[tuple[str, str]], templates: Mapping[str, str]
) -> Iterator[tuple[str, list[tuple[int, ...]]]]:
    """The prompts as the student sees them, and by each template, with the row's answer in them."""
    yield "student", [tokenization.prompt_ids(prompt) for prompt, _ in asked]
    for name, template in templates.items():
        seen = TeacherPrompt(template, tokenization.max_prompt_length)
        yield name, [tokenization.prompt_ids(seen.of(prompt, answer)) for prompt, answer in asked]


def finding(
    policy: nn.Module,
    tokenization: Tokenization,
    prompts: Sequence[tuple[int, ...]],
    asked: Sequence[tuple[str, str]],
    judge: Callable[[int, Sample, str], float],
    others: Sequence[str] = (),
) -> dict[str, float]:
    """Of samples after prompts, and of other right answers if there are any."""
    sampler = TransformersSampler(policy, batch_size=512, pad_token_id=tokenization.pad_id)
    params = SamplingParams(tokenization.max_completion_length, tokenization.stop_ids(False))
    drawn = sampler.sample(prompts, params, num_samples=NUM_SAMPLES)
    scores, copies = [], []
    for place, samples in enumerate(drawn):
        for sample in samples:
            text = tokenization.text(sample.token_ids)
            scores.append(judge(place, sample, text))
            copies.append(text.strip().split("\n")[0].split() == asked[place][1].split())
    values, copied = np.asarray(scores), np.asarray(copies)
    found = {
        "score": float(values.mean()),
        "score_without_copies": float(values[~copied].mean()) if not copied.all() else float("nan"),
        "copies": float(copied.mean()),
        "logp_of_another": float("nan"),
    }
    if others:
        completions = [
            tokenization.completion(text, other, Role.SAMPLE) for (text, _), other in zip(asked, others, strict=True)
        ]
        groups = [Group(prompt, (answer,)) for prompt, answer in zip(prompts, completions, strict=True)]
        found["logp_of_another"] = float(np.mean(cached_logps(policy, groups, batch_size=64)))
    return found


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
    parser.add_argument("--model", help="a language model instead of the worlds' own")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=["arrange_16"], help="for --model")
    parser.add_argument("--rows", type=int, default=64, help="of a task, for --model")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    found: list[dict[str, Any]] = []
    measured = _of_a_model(options) if options.model else _of_worlds(options)
    for part in measured:
        found.append(part)
        write_json(options.output, [{k: None if v != v else v for k, v in row.items()} for row in found])
    _show(found)


def _of_worlds(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    base = base_folder(BaseModel())
    tokenization = Tokenization(AutoTokenizer.from_pretrained(base), 99, 14)
    for name in options.worlds:
        for seed in options.seeds:
            policy = AutoModelForCausalLM.from_pretrained(base).eval()
            world = World(name, seed, "reporting", WorldOptions(demonstrations=SFT[name][2]))
            for model in ("base", "sft"):
                if model == "sft":
                    with tempfile.TemporaryDirectory() as folder:
                        policy.load_state_dict(after_sft(name, seed, Path(folder)))
                for values in in_a_world(policy, tokenization, world, seed):
                    yield {"world": name, "seed": seed, "model": model, **values}


def _of_a_model(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    policy, tokenizer = load_model(options.model).eval(), load_tokenizer(options.model)
    for name in options.tasks:
        tokenization = Tokenization(tokenizer, 999, TASKS[name].tokens)
        for seed in options.seeds:
            for values in on_a_task(policy, tokenization, TASKS[name], seed, options.rows):
                yield {"world": name, "seed": seed, "model": Path(options.model).name, **values}


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
