"""The parsers of the commands that do not train. Nothing here takes time to import: mistakes are told at once."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from tutelage.cli.output import try_folder
from tutelage.data.formats import Columns
from tutelage.errors import UserError
from tutelage.ranges import whole

__all__ = [
    "CommandParser",
    "column_arguments",
    "columns_of",
    "command_parser",
    "data_arguments",
    "length_arguments",
    "new_file",
    "row_arguments",
    "take_config",
    "usage_error",
    "weight_arguments",
]


class CommandParser(argparse.ArgumentParser):
    """An argument parser whose mistakes are a ``UserError`` and whose help shows defaults where there are some."""

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        if options.get("default") not in (None, argparse.SUPPRESS):
            options["help"] += " (default: %(default)s)"
        return super().add_argument(*names, **options)

    def error(self, message: str) -> NoReturn:
        raise usage_error(self.prog, message)


def usage_error(prog: str, message: str) -> UserError:
    """What is wrong with a command line, as argparse says it."""
    if bad_value := re.match(r"argument --?(\w+)(?:/\S+)?: (must be .*)", message, re.DOTALL):  # a Range says it
        return UserError(bad_value[2], field=bad_value[1])
    message = re.sub(r"(--\w+)/--[\w-]+", r"\1", message)  # transformers gives each argument a second spelling
    return UserError(f"{message}.", remedy=f"{prog} --help explains the arguments.")


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
    parser.add_argument("--dataset_name", required=True, help="Dataset: a hub name, a folder or a file.")
    row_arguments(parser)


def row_arguments(parser: argparse.ArgumentParser) -> None:
    """Which rows of a dataset."""
    parser.add_argument("--dataset_config", help="Configuration of a hub dataset.")
    parser.add_argument("--split", default="train", help="Split of the dataset.")
    parser.add_argument(
        "--on_long_prompt",
        default="error",
        choices=["error", "drop"],
        help="What to do with a prompt that is too long: stop with an error, or drop the row.",
    )
    column_arguments(parser)


def column_arguments(parser: argparse.ArgumentParser) -> None:
    """Which columns of a dataset; ``columns_of`` reads them."""
    parser.add_argument("--prompt_column", help="Column to read as the prompt; known columns are recognized.")
    parser.add_argument("--completion_column", help="Column to read as the demonstration, with --prompt_column.")
    parser.add_argument("--messages_column", help="Column to read as the conversation, whatever others there are.")


def columns_of(options: argparse.Namespace) -> Columns:
    """The columns that the arguments name."""
    return Columns(options.prompt_column, options.completion_column, options.messages_column)


def length_arguments(parser: argparse.ArgumentParser) -> None:
    """How long prompts and completions may be."""
    parser.add_argument("--max_prompt_length", type=whole(1), default=512, help="Maximum prompt length, in tokens.")
    parser.add_argument(
        "--max_completion_length",
        type=whole(1),
        default=256,
        help="Maximum completion length, in tokens; longer completions are truncated.",
    )


def weight_arguments(parser: argparse.ArgumentParser) -> None:
    """How the weights of models are loaded."""
    parser.add_argument(
        "--dtype",
        choices=["auto", "bfloat16", "float16", "float32"],
        help="Precision of the weights; auto uses the stored one.",
    )
    parser.add_argument("--trust_remote_code", action="store_true", help="Run code that comes with the model.")


def new_file(name: str) -> Path:
    """The path of a file that a command is to write.

    Raises:
        UserError: it exists, or it cannot be written where it is to be.
    """
    path = Path(name)
    if path.exists():
        raise UserError(
            "the file already exists.", file=str(path), remedy="Remove it, or give another name.", field="output"
        )
    try_folder(path.parent)
    return path


def take_config(args: Sequence[str]) -> tuple[str | None, list[str]]:
    """The file after --config, and the other arguments."""
    args = [part for arg in args for part in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]
    if "--config" not in args:
        return None, args
    place = args.index("--config")
    if place + 1 >= len(args):
        raise UserError("--config needs a file.", remedy="Write --config recipe.yaml.", field="config")
    return args[place + 1], args[:place] + args[place + 2 :]
