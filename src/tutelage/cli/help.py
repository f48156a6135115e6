"""The --help of the training commands: their own fields, without the hundred inherited from transformers."""

from __future__ import annotations

import inspect
import shutil
import textwrap
from dataclasses import MISSING, Field, fields
from enum import Enum
from typing import Any

from tutelage.algorithms.registry import find
from tutelage.training.config import DemonstrationConfig

__all__ = ["help_text"]

# Inherited fields that nearly everyone sets, in our words where the inherited ones say something else than what happens
# here; --help lists them, --help_all every other one too.
_COMMON: dict[str, str | None] = {
    "dataset_config": "Configuration of a hub dataset.",
    "dataset_train_split": "Split to train on, or a slice of it: 'train[:90%]'.",
    "dataset_test_split": (
        "Split to evaluate on, if --eval_strategy asks for evaluation and --eval_dataset_name names no other data."
    ),
    "dataset_streaming": "Read the data during training instead of checking and tokenizing all of it first.",
    "model_name_or_path": "Model to start from: a hub name, a folder, or the output folder of another run.",
    "model_revision": "Branch, tag or commit of the model on the hub.",
    "attn_implementation": "Attention implementation of transformers, for example sdpa or flash_attention_2.",
    "use_peft": "Train a LoRA adapter and keep the model's own weights frozen.",
    "lora_r": "Rank of the LoRA adapter.",
    "lora_alpha": "Scaling factor α of the LoRA adapter.",
    "lora_dropout": "Dropout of the LoRA adapter.",
    "load_in_4bit": "Load the base model in 4-bit precision; only with --use_peft.",
    "output_dir": "Folder for the model, checkpoints, samples, results.json and report.html.",
    "num_train_epochs": "Passes over the demonstrations.",
    "max_steps": "Total number of optimizer steps; if above 0, overrides --num_train_epochs. Required for streamed data.",
    "per_device_train_batch_size": "Demonstrations per micro-batch.",
    "per_device_eval_batch_size": "Prompts per forward pass without gradients.",
    "gradient_accumulation_steps": "Micro-batches per optimizer step.",
    "lr_scheduler_type": "linear, cosine, constant, constant_with_warmup, … (SchedulerType of transformers).",
    "warmup_steps": None,
    "optim": "adamw_torch_fused, adafactor, rmsprop, … (OptimizerNames of transformers).",
    "weight_decay": None,
    "max_grad_norm": None,
    "seed": "Random seed of data order, dropout and samples.",
    "eval_strategy": "When to evaluate during training: no, steps or epoch.",
    "eval_steps": "Optimizer steps between evaluations with --eval_strategy steps; by default the same as --logging_steps.",
    "save_strategy": "When to write checkpoints: no, steps, epoch or best.",
    "save_steps": "Optimizer steps between checkpoints.",
    "run_name": "Name of this run in tables and reports; by default the name of the algorithm.",
    "report_to": "Where to send metrics besides the terminal: trackio, wandb, tensorboard, … (install it first).",
    "push_to_hub": "Push the trained model to the hub.",
    "gradient_checkpointing": "Recompute activations in the backward pass, which saves memory and takes more time.",
}


def help_text(
    command: str, data: type, model: type, config: type[DemonstrationConfig], *, everything: bool = False
) -> str:
    """What --help prints.

    Args:
        data, model, config: the dataclasses whose fields are the command's arguments.
        everything: list every inherited field too.
    """
    shared = {entry.name for entry in fields(DemonstrationConfig)}
    sections = {
        "Data": fields(data),
        "Model": fields(model),
        command.upper(): [entry for entry in fields(config) if entry.name not in shared],
        "Training": [entry for entry in fields(config) if entry.name in shared],
    }
    ours = [cls for cls in (data, model, *config.__mro__) if cls.__module__.startswith("tutelage.")]
    listed = _COMMON.keys() | {name for cls in ours for name in inspect.get_annotations(cls)}
    lines = [
        f"usage: tutelage {command} --model_name_or_path MODEL --dataset_name DATA --output_dir OUT [--config FILE]",
        "",
        *_wrapped(f"{command}: {find(command).info.summary}. More in docs/{find(command).info.page}."),
        "",
        *_wrapped(
            "Command-line arguments override the YAML file given with --config, which overrides the defaults in brackets. "
            "--help_all also lists every field of transformers and TRL.",
        ),
    ]
    for title, entries in sections.items():
        shown = [entry for entry in entries if entry.init and (everything or entry.name in listed)]
        lines += ["", f"{title}:"] if shown else []
        for entry in shown:
            classes = (*config.__mro__, *data.__mro__, *model.__mro__)
            declared = next((cls for cls in classes if entry.name in inspect.get_annotations(cls)), config)
            own = declared.__module__.startswith("tutelage.")
            lines += [f"  --{entry.name}", *_wrapped(_explained(entry, own=own), indent=6)]
    return "\n".join(lines)


def _explained(entry: Field[Any], *, own: bool) -> str:
    """Our words for a field; those we have for a library's field, unless one of our configs ``own``s it, or the library's."""
    text = (None if own else _COMMON.get(entry.name)) or str(entry.metadata.get("help", "")).replace("%%", "%")
    default = entry.default if entry.default_factory is MISSING else entry.default_factory()
    choices = entry.metadata.get("choices")
    notes = [f"one of {', '.join(choices)}"] if choices else []
    if default not in (None, MISSING, "", []):
        default = default.value if isinstance(default, Enum) else default
        notes.append(f"default {' '.join(map(str, default)) if isinstance(default, list) else default}")
    return f"{text} [{'; '.join(notes)}]" if notes else text


def _wrapped(text: str, indent: int = 0) -> list[str]:
    width = min(shutil.get_terminal_size((100, 24)).columns, 100)
    return textwrap.wrap(
        text, width, break_on_hyphens=False, initial_indent=" " * indent, subsequent_indent=" " * indent
    )
