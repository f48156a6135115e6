"""What the commands that do not train share: arguments, loading, and files of JSON lines."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tutelage.cli.arguments import CommandParser
from tutelage.data import Tokenization, load_dataset
from tutelage.errors import UserError
from tutelage.models.loading import check_vocabulary, load_model, load_tokenizer

__all__ = [
    "command_parser",
    "data_arguments",
    "length_arguments",
    "load_data",
    "load_policy",
    "load_tokenization",
    "new_file",
    "on_device",
    "weight_arguments",
    "weight_dtype",
]


def command_parser(
    command: str, description: str | None, *groups: Callable[[argparse.ArgumentParser], None]
) -> argparse.ArgumentParser:
    """The parser of a command, with some groups of arguments."""
    parser = CommandParser(prog=f"tutelage {command}", description=description, allow_abbrev=False)
    for group in groups:
        group(parser)
    return parser


def data_arguments(parser: argparse.ArgumentParser) -> None:
    """Which data; ``load_data`` reads them."""
    parser.add_argument("--dataset_name", required=True, help="A hub name, a folder or a file.")
    parser.add_argument("--dataset_config", help="Configuration of a hub data set.")
    parser.add_argument("--split", default="train", help="Split of the data set.")
    parser.add_argument("--on_long_prompt", default="error", choices=["error", "drop"], help="Stop, or drop the row.")


def length_arguments(parser: argparse.ArgumentParser) -> None:
    """How long prompts and completions may be."""
    parser.add_argument("--max_prompt_length", type=int, default=512, help="Longest prompt, in tokens.")
    parser.add_argument("--max_completion_length", type=int, default=256, help="Completions are cut here, in tokens.")


def weight_arguments(parser: argparse.ArgumentParser) -> None:
    """How the weights of models are loaded."""
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "bfloat16", "float16", "float32"],
        help="Precision of the weights; auto takes the stored one.",
    )
    parser.add_argument("--trust_remote_code", action="store_true", help="Run code that comes with the model.")


def load_data(options: argparse.Namespace) -> Any:
    """The data set that the arguments name."""
    return load_dataset(options.dataset_name, config_name=options.dataset_config, split=options.split)


def load_tokenization(options: argparse.Namespace, name: str) -> Tokenization:
    """How a model's prompts and completions become tokens."""
    return Tokenization(
        load_tokenizer(name, trust_remote_code=options.trust_remote_code),
        options.max_prompt_length,
        options.max_completion_length,
        options.on_long_prompt,
    )


def load_policy(options: argparse.Namespace, name: str, tokenization: Tokenization) -> Any:
    """A language model that knows the tokenizer's tokens, ready to sample from and to score with."""
    model = load_model(name, dtype=weight_dtype(options), trust_remote_code=options.trust_remote_code)
    check_vocabulary(model, tokenization.tokenizer)
    return on_device(model)


def on_device(model: Any) -> Any:
    """The model on the accelerator, if there is one, with dropout off."""
    return model.to(torch.accelerator.current_accelerator() or "cpu").eval()


def weight_dtype(options: argparse.Namespace) -> torch.dtype | str:
    """What --dtype says, as ``from_pretrained`` takes it."""
    return options.dtype if options.dtype == "auto" else getattr(torch, options.dtype)


def new_file(name: str) -> Path:
    """The path of a file that a command is to write.

    Raises:
        UserError: it exists.
    """
    path = Path(name)
    if path.exists():
        raise UserError("the file exists.", file=str(path), remedy="Remove it or name another.", field="output")
    return path
