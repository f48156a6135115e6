"""The command line: parse, call, print."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from tutelage.errors import UserError

__all__ = ["main"]

USAGE = """\
tutelage: alignment from demonstrations alone.

  tutelage quickstart              the whole comparison on a small language model, on a CPU
  tutelage sft | spin | irft | rft train from demonstrations  (--model_name_or_path, --dataset_name, --output_dir)
  tutelage sample                  completions of a model for a data set's prompts, to JSONL
  tutelage score                   rewards of a data set's completions, or of samples, to JSONL
  tutelage evaluate                what trained models learned, against their start and their controls
  tutelage report RUN [RUN …]      one page that compares runs
  tutelage data DATA               what the model will see of a data set

tutelage COMMAND --help explains a command's own arguments; --debug shows the traceback of an error."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, or 2 for an error that the user can mend."""
    command, *args = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    args, debug = _take_debug(args)
    if command in ("-h", "--help"):
        print(USAGE)
        return 0
    try:
        return _run(command, args)
    except UserError as error:
        if debug:
            raise
        print(f"tutelage: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ntutelage: stopped. Train commands go on with --resume.", file=sys.stderr)
        return 130


def _take_debug(args: list[str]) -> tuple[list[str], bool]:
    """A bare --debug is ours; with a value it is transformers' (--debug underflow_overflow)."""
    for place, arg in enumerate(args):
        if arg == "--debug" and (place + 1 == len(args) or args[place + 1].startswith("-")):
            return args[:place] + args[place + 1 :], True
    return args, False


def _run(command: str, args: list[str]) -> int:
    # torch and transformers take seconds to import: not before there is something to do with them.
    training = {"sft", "spin", "irft", "rft"}
    known = training | {"sample", "score", "evaluate", "report", "data", "quickstart"}
    if command not in known:
        raise UserError(f"there is no command '{command}'.", remedy=f"Commands: {', '.join(sorted(known))}.")
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 120)
    _quiet_libraries()
    if command in training:
        from tutelage.cli import train

        train.main(command, args, console)
    elif command == "quickstart":
        from tutelage.cli import quickstart

        quickstart.main(args, console)
    elif command == "score":
        from tutelage.cli import score

        score.main(args, console)
    else:
        from tutelage.cli import commands

        getattr(commands, command)(args, console)
    return 0


def _quiet_libraries() -> None:
    """Keep the libraries' progress bars and notices off the screen; their warnings stay."""
    import warnings

    import datasets
    from transformers.utils import logging as transformers_logging

    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\..*")
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
