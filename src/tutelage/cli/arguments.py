"""Command-line arguments: the names of TRL and transformers, and what is our own."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

import torch
import yaml
from peft import PeftConfig
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from tutelage.cli.help import help_text
from tutelage.errors import UserError
from tutelage.models.loading import load_model
from tutelage.training.config import DemonstrationConfig

__all__ = ["CommandParser", "DataArguments", "ModelArguments", "parse"]


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
            "help": "Precision of the weights that are loaded. By default float32 where they are trained, because small "
            "steps vanish in bfloat16, and the stored precision where they stay frozen under an adapter.",
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
        options = {}
        if self.load_in_4bit or self.load_in_8bit:
            self.dtype = self.dtype or "bfloat16"  # what the quantized products are computed in
        quantization = get_quantization_config(self)
        if quantization is not None:
            options["quantization_config"] = quantization
        return load_model(
            name,
            dtype=self.dtype if self.dtype in (None, "auto") else getattr(torch, self.dtype),
            whole=not self.use_peft,
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


class CommandParser(argparse.ArgumentParser):
    """An argument parser whose mistakes are a ``UserError`` and whose help shows defaults where there are some."""

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        if options.get("default") not in (None, argparse.SUPPRESS):
            options["help"] += " (default: %(default)s)"
        return super().add_argument(*names, **options)

    def error(self, message: str) -> NoReturn:
        raise _usage_error(self.prog, message)


class _TrainParser(TrlParser):
    def error(self, message: str) -> NoReturn:
        raise _usage_error(self.prog, message)


def _usage_error(prog: str, message: str) -> UserError:
    message = re.sub(r"(--\w+)/--[\w-]+", r"\1", message)  # transformers gives each argument a second spelling
    return UserError(f"{message}.", remedy=f"{prog} --help explains the arguments.")


def parse(command: str, config: type[DemonstrationConfig], args: Sequence[str]) -> tuple[Any, ...]:
    """Parse a command line and its ``--config`` file into data, model and training arguments.

    Raises:
        UserError: a config file that cannot be read, an unknown argument, a bad value, or no output folder.
        SystemExit: after printing the help (code 0).
    """
    kinds = (DataArguments, ModelArguments, config)
    if not {"-h", "--help", "--help_all"}.isdisjoint(args):
        print(help_text(command, *kinds, everything="--help_all" in args))
        sys.exit(0)
    parser = _TrainParser(kinds, prog=f"tutelage {command}", allow_abbrev=False)  # type: ignore[arg-type]
    path, args = _take_config(args)
    if path is not None:
        from_file, others = _config_arguments(path, kinds)
        parser.set_defaults_with_config(**others)
        args = [*from_file, *args]
    try:
        *parsed, unknown = parser.parse_args_into_dataclasses(
            args, return_remaining_strings=True, look_for_args_file=False
        )
    except UserError:
        raise
    except (ValueError, OSError, ImportError) as error:
        raise UserError(" ".join(str(error).split())) from error
    if unknown:
        name = unknown[0].split("=")[0]
        remedy = _closest(name.lstrip("-").replace("-", "_"), kinds, "--") or f"tutelage {command} --help lists them."
        raise UserError(f"unknown argument '{name}'.", remedy=remedy)
    if not any(arg.startswith(("--output_dir", "--output-dir")) for arg in args):
        raise UserError("no output folder is given.", remedy="Add --output_dir OUT.", field="output_dir")
    return tuple(parsed)


def _take_config(args: Sequence[str]) -> tuple[str | None, list[str]]:
    """The file after --config, and the other arguments."""
    args = [part for arg in args for part in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]
    if "--config" not in args:
        return None, args
    place = args.index("--config")
    if place + 1 >= len(args):
        raise UserError("--config needs a file.", remedy="Write --config recipe.yaml.", field="config")
    return args[place + 1], args[:place] + args[place + 2 :]


def _config_arguments(path: str, kinds: Iterable[type]) -> tuple[list[str], dict[str, Any]]:
    """A config file as command-line arguments, so that its values meet the same checks, and what cannot be written so.

    Raises:
        UserError: the file cannot be read, is no mapping, or has an unknown key.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"cannot be read: {error.strerror}.", file=path, remedy="Check the path after --config.", field="config"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        raise UserError(
            f"not YAML: {getattr(error, 'problem', None) or error}.",
            file=path,
            row=mark and mark.line + 1,
            remedy="Write lines of 'name: value'.",
        ) from error
    if not isinstance(content, dict):
        raise UserError("holds no fields.", file=path, remedy="Write lines of 'name: value'.")
    hints = {name: hint for kind in kinds for name, hint in get_type_hints(kind).items()}
    args, others = [], {}
    for name, value in content.items():
        if name not in _names(kinds):
            raise UserError("unknown field.", file=path, field=str(name), remedy=_closest(str(name), kinds))
        if isinstance(value, list) and str not in get_args(hints[name]):
            args += [f"--{name}", *map(str, value)]
        elif isinstance(value, (dict, list)):
            others[name] = value
        elif value is not None:
            args.append(f"--{name}={value}")
    return args, others


def _names(kinds: Iterable[type]) -> list[str]:
    return [entry.name for kind in kinds for entry in fields(kind) if entry.init]


def _closest(name: str, kinds: Iterable[type], dashes: str = "") -> str | None:
    close = get_close_matches(name, _names(kinds), n=1)
    return f"Did you mean {dashes}{close[0]}?" if close else None
