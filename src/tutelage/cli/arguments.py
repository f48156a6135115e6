"""Command-line arguments: the names of TRL and transformers, and what is our own."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import PeftConfig
from transformers import TrainingArguments
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from tutelage.errors import UserError
from tutelage.models import load_model

__all__ = ["DataArguments", "ModelArguments", "parse"]

# Inherited fields that nearly everyone sets; --help lists them, --help_all every other one too.
_COMMON = {
    "output_dir",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "lr_scheduler_type",
    "warmup_steps",
    "optim",
    "seed",
    "eval_strategy",
    "eval_steps",
    "save_strategy",
    "save_steps",
    "save_total_limit",
    "report_to",
    "push_to_hub",
    "gradient_checkpointing",
}


@dataclass
class DataArguments(ScriptArguments):
    """Which data, and what to do with an output folder that is in use."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Demonstrations: a hub name, a folder, or a .json, .jsonl, .csv or .parquet file (also .gz)."
        },
    )
    eval_dataset_name: str | None = field(
        default=None, metadata={"help": "Held-out rows, likewise. By default none are looked at."}
    )
    run_name_in_tables: str | None = field(
        default=None, metadata={"help": "What tables and reports call this run; by default the algorithm."}
    )
    resume: bool = field(
        default=False, metadata={"help": "Go on with the run in --output_dir from its last checkpoint and samples."}
    )
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace the run that is in --output_dir."})


@dataclass
class ModelArguments(ModelConfig):
    """Which model, with which adapter."""

    dtype: str | None = field(
        default=None,
        metadata={
            "help": "Precision of the weights that are loaded. By default bfloat16 where they stay frozen under an "
            "adapter and float32 where they are trained: small steps vanish in bfloat16.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )
    lora_target_modules: list[str] | None = field(
        default_factory=lambda: ["all-linear"],
        metadata={"help": "Modules that get LoRA weights; 'all-linear' is every linear layer but the head."},
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code that comes with the model. Off unless you ask for it."}
    )

    def load(self) -> Any:
        """The model these arguments name.

        Raises:
            UserError: none is named, or it cannot be loaded.
        """
        name = self.require_name()
        trained_whole = not self.use_peft and not (Path(name) / "adapter_config.json").exists()
        dtype = self.dtype or ("float32" if trained_whole else "bfloat16")
        options = {}
        quantization = get_quantization_config(self)
        if quantization is not None:
            options["quantization_config"] = quantization
        return load_model(
            name,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            revision=self.model_revision,
            attn_implementation=self.attn_implementation,
            trust_remote_code=self.trust_remote_code,
            **options,
        )

    def require_name(self) -> str:
        """The model's name or path; ``UserError`` without one."""
        if not self.model_name_or_path:
            raise UserError("no model is given.", remedy="Add --model_name_or_path MODEL.", field="model_name_or_path")
        return self.model_name_or_path

    def peft_config(self) -> PeftConfig | None:
        """The adapter these arguments describe, if any."""
        return get_peft_config(self)


def parse(command: str, config: type[TrainingArguments], args: Sequence[str]) -> tuple[Any, ...]:
    """Parse a command line and its ``--config`` file into data, model and training arguments.

    Raises:
        UserError: a config file that cannot be read or has unknown keys, a missing output folder, or a bad value.
        SystemExit: unknown arguments on the command line (code 2), or after printing the help (code 0).
    """
    parser = TrlParser((DataArguments, ModelArguments, config), prog=f"tutelage {command}", allow_abbrev=False)  # type: ignore[arg-type]
    parser.add_argument("--config", help="A YAML file with any of these fields; the command line overrides it.")
    parser.add_argument("--help_all", action="store_true", help="This help with every field of transformers.")
    if "--help_all" in args:
        parser.print_help()
        sys.exit(0)
    if "--help" in args or "-h" in args:
        _hide_inherited(parser, config)
        parser.print_help()
        sys.exit(0)
    args = [part for arg in args for part in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]
    # TrlParser takes the first --config away; the argument above only documents it.
    parser._remove_action(parser._option_string_actions.pop("--config"))
    parser._remove_action(parser._option_string_actions.pop("--help_all"))
    _check_config_file(args)
    try:
        parsed = parser.parse_args_and_config(args=list(args))
    except UserError:
        raise
    except (ValueError, OSError, ImportError) as error:
        raise UserError(str(error)) from error
    if parsed[2].output_dir in (None, "trainer_output") and not any(a.startswith("--output_dir") for a in args):
        raise UserError("no output folder is given.", remedy="Add --output_dir OUT.", field="output_dir")
    return parsed


def _check_config_file(args: Sequence[str]) -> None:
    if "--config" not in args:
        return
    place = list(args).index("--config") + 1
    if place >= len(args):
        raise UserError("--config needs a file.", remedy="Write --config recipe.yaml.", field="config")
    path = args[place]
    if not os.path.isfile(path):
        raise UserError("no such file.", file=path, remedy="Check the path after --config.", field="config")
    try:
        with open(path, encoding="utf-8") as file:
            yaml.safe_load(file)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"not YAML: {error}", file=path, field="config") from error


def _hide_inherited(parser: TrlParser, config: type[TrainingArguments]) -> None:
    own = {name for cls in config.__mro__ if cls.__module__.startswith("tutelage.") for name in cls.__annotations__}
    inherited = set(TrainingArguments.__dataclass_fields__) - own - _COMMON
    for action in parser._actions:
        if action.dest in inherited or action.dest == "ignore_bias_buffers":
            action.help = argparse.SUPPRESS
