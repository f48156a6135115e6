"""One run: the library's own trainer in a world, then what is measured of its policy."""

from __future__ import annotations

import copy
import inspect
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from tutelage.algorithms.registry import Algorithm, find
from tutelage.errors import UserError
from tutelage.files import replacing
from tutelage.lab.base import base_folder
from tutelage.lab.code import code_version
from tutelage.lab.definitions import Run
from tutelage.lab.measures import LENGTHS, measure, measure_reward
from tutelage.lab.mixture import retention_rows
from tutelage.lab.worlds import World

__all__ = ["check_settings", "execute"]

# What a run of seconds has no use for: precision to measure, bars to draw, logs and checkpoints to write.
_SETTINGS: dict[str, Any] = {
    **LENGTHS,
    "use_cpu": True,
    "bf16": False,
    "report_to": [],
    "disable_tqdm": True,
    "logging_strategy": "no",
    "save_strategy": "no",
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 64,
    "sampling_batch_size": 512,
    "lr_scheduler_type": "linear",
    "warmup_steps": 5,
    "dataloader_pin_memory": False,
}
_STAGED: dict[str, Any] = {"save_each_stage": False}
BASE = "{base}"
"""What settings say in the place of the base model's folder."""

_RETENTION_ROWS = 64


def execute(run: Run, weights: Path, cache: str | Path | None = None) -> dict[str, Any]:
    """Train and measure; keep the policy.

    Args:
        run: what to do.
        weights: folder of policies, ``NAME.safetensors`` each; the run's start lies there, and its own policy will.
        cache: see ``base_folder``.

    Returns:
        the definition, the version of the code, the measures, and what it cost; ``flops`` are None where not known.

    Raises:
        UserError: settings that the algorithm refuses.
    """
    begun = time.perf_counter()
    folder = base_folder(run.base, cache)
    base, tokenizer = _loaded(folder)
    start = copy.deepcopy(base)
    if run.start is not None:
        start.load_state_dict(load_file(weights / f"{run.start.name}.safetensors"))
    policy = copy.deepcopy(start)
    world = World(run.world, run.seed, run.phase, run.options)
    rows = world.validation() if run.phase == "tuning" else world.test()
    costs: dict[str, Any] = {
        "trained_tokens": 0,
        "sampled_tokens": 0,
        "steps": 0,
        "flops": 0.0,
        "seconds_training": 0.0,
    }
    reward_measures: dict[str, float] = {}
    if run.algorithm != "none":
        with tempfile.TemporaryDirectory(prefix="tutelage-lab-") as temporary:
            trainer = _trainer(run, policy, tokenizer, world, folder, temporary)
            trainer.train()
            costs = {
                "trained_tokens": trainer.costs.trained_tokens,
                "sampled_tokens": trainer.costs.sampled_tokens,
                "steps": trainer.state.global_step,
                "flops": None if trainer.costs.flops is None else sum(trainer.costs.flops.values()),
                "seconds_training": time.perf_counter() - begun,
            }
            reward = trainer.stages.phase.reward if trainer.stages else None
            if reward is not None:
                reward_measures = asdict(measure_reward(reward, start, tokenizer, world, rows))
    trained = time.perf_counter()
    found = measure(policy.eval(), start, tokenizer, world, rows, retention_rows(_RETENTION_ROWS, run.seed))
    save_weights(policy, weights / f"{run.name}.safetensors")
    seconds = {"seconds_measuring": time.perf_counter() - trained, "seconds": time.perf_counter() - begun}
    return {
        "definition": run.definition,
        "code": code_version(),
        "measures": asdict(found) | reward_measures,
        "costs": costs | seconds,
    }


def _trainer(
    run: Run, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, world: World, base: Path, folder: str
) -> Any:
    """The algorithm's trainer, which trains ``policy`` in place; what it writes goes into ``folder``."""
    algorithm = find(run.algorithm)
    demonstrations = Dataset.from_list([row.demonstration for row in world.demonstrations()])
    options: dict[str, Any] = {}
    if run.takes_prompts and run.options.prompts:
        options["prompt_dataset"] = Dataset.from_dict({"prompt": world.prompts()})
    args = config(algorithm, run.settings, run.seed, str(Path(folder) / "run"), {BASE: str(base)})
    return algorithm.trainer(policy, args, demonstrations, processing_class=tokenizer, **options)


def config(
    algorithm: Algorithm, settings: Mapping[str, Any], seed: int, folder: str, places: Mapping[str, str]
) -> Any:
    """The algorithm's config with the lab's settings under those of the run.

    Raises:
        UserError: the algorithm has no such setting, or refuses its value.
    """
    known = {entry.name for entry in fields(cast(Any, algorithm.config))}
    for name in settings:
        if name not in known:
            raise UserError(f"{algorithm.info.name} has no such setting.", field=name)
    own = _SETTINGS | {name: value for name, value in _STAGED.items() if name in known}
    given = {name: places.get(value, value) if isinstance(value, str) else value for name, value in settings.items()}
    return algorithm.config(output_dir=folder, seed=seed, **{**own, **given})


def check_settings(name: str, settings: Mapping[str, Any], *, takes_prompts: bool) -> None:
    """Raise ``UserError`` for what an algorithm would refuse, before anything runs."""
    if name == "none":
        if settings or takes_prompts:
            raise UserError("leaves the start as it is and has no settings.")
        return
    algorithm = find(name)
    with tempfile.TemporaryDirectory(prefix="tutelage-lab-") as temporary:
        config(algorithm, settings, 0, temporary, {})
    if takes_prompts and "prompt_dataset" not in inspect.signature(algorithm.trainer).parameters:
        raise UserError(f"{name} takes no prompts without demonstrations.", field="takes_prompts")


def save_weights(policy: PreTrainedModel, path: Path) -> None:
    """Under a temporary name first: a reader sees all of it or nothing."""
    with replacing(path) as temporary:
        save_file({name: value.contiguous() for name, value in policy.state_dict().items()}, temporary)


@lru_cache(maxsize=2)
def _loaded(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    return model.eval(), AutoTokenizer.from_pretrained(folder)
