"""The command line: parse, call, print."""

from __future__ import annotations

import errno
import sys
import time
from collections.abc import Sequence
from importlib import import_module

from tutelage.algorithms.registry import NAMES
from tutelage.errors import CollapsedError, Terminated, UserError
from tutelage.launch import process_index
from tutelage.visible import write

__all__ = ["main"]

USAGE = f"""\
tutelage: alignment from demonstrations alone.

  tutelage quickstart              the whole comparison on a small language model, on a CPU
  tutelage {" | ".join(NAMES):<24}train from demonstrations  (--model_name_or_path, --dataset_name, --output_dir)
  tutelage sample                  sample completions for the prompts of a dataset, to JSONL
  tutelage score                   score the completions of a dataset, or samples, with a reward, to JSONL
  tutelage evaluate                evaluate trained models against their start and their controls
  tutelage extrapolate             go on from a trained model, away from its start, to a new model
  tutelage report RUN [RUN …]      one page that compares runs
  tutelage data DATA               what the model will see of a dataset
  tutelage clean DATA              rank demonstrations, and write the better ones
  tutelage vllm-command MODEL      the command that starts a vLLM server for --sampler vllm
  tutelage lab run | list          algorithms in planted worlds, seconds per run, to one table and a page

tutelage COMMAND --help lists the arguments of a command; --debug shows the traceback of an error."""


# The module of each command; its ``main`` takes the arguments and a console.
_COMMANDS = {
    "quickstart": "quickstart",
    **dict.fromkeys(NAMES, "train"),
    "sample": "sample",
    "score": "score",
    "evaluate": "evaluate",
    "extrapolate": "extrapolate",
    "report": "report",
    "data": "data",
    "clean": "clean",
    "vllm-command": "vllm_command",
    "lab": "lab",
}


_DISK = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO),
    *(errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EISDIR),
}
"""What is the disk's fault, or the folder's, and not a mistake of this library."""


_WHILE_IT_IMPORTS = 20.0
"""Seconds that a process waits with an error that the first one may have too, and be on the way to."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code.

    0; 2 for an error that the user can fix; 3 where a policy collapsed and training was to stop then; 130 for Ctrl-C, and 143
    where training was asked to end (SIGTERM).
    """
    command, *args = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    args, debug = _take_debug(args)
    if command in ("-h", "--help"):
        write(USAGE)
        return 0
    try:
        return _run(command, args)
    except UserError as error:
        if debug:
            raise
        _let_the_first_speak()
        write(f"tutelage: error: {error}", sys.stderr)
        return 3 if isinstance(error, CollapsedError) else 2
    except OSError as error:
        if debug or error.errno not in _DISK:
            raise
        place = f"{error.filename}: " if error.filename else ""
        write(
            f"tutelage: error: {place}cannot be read or written: {error.strerror}. Mend the folder or make room, and run again.",
            sys.stderr,
        )
        return 2
    except Terminated:
        write("\ntutelage: asked to end (SIGTERM); what is done is saved. Go on with --resume.", sys.stderr)
        return 143
    except KeyboardInterrupt:
        write("\ntutelage: stopped. Continue a training run with --resume.", sys.stderr)
        return 130


def _let_the_first_speak() -> None:
    """What is wrong for all processes of a run is said once: the first to end has the launcher end the others."""
    if process_index() > 0:
        time.sleep(_WHILE_IT_IMPORTS)


def _take_debug(args: list[str]) -> tuple[list[str], bool]:
    """A bare --debug is ours; with a value it is transformers' (--debug underflow_overflow)."""
    for place, arg in enumerate(args):
        if arg == "--debug" and (place + 1 == len(args) or args[place + 1].startswith("-")):
            return args[:place] + args[place + 1 :], True
    return args, False


def _run(command: str, args: list[str]) -> int:
    if command not in _COMMANDS:
        raise UserError(f"unknown command '{command}'.", remedy=f"Commands: {', '.join(sorted(_COMMANDS))}.")
    from tutelage.terminal import SafeConsole

    console = SafeConsole(width=None if sys.stdout.isatty() else 120, quiet=process_index() > 0)
    if _COMMANDS[command] == "train":
        # torch and transformers take seconds to import: what can be refused without them is refused before.
        from tutelage.cli.checks import check_training

        check_training(command, args)
        args = [command, *args]
    import_module(f"tutelage.cli.{_COMMANDS[command]}").main(args, console)
    return 0
