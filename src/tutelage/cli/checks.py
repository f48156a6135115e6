"""What can be said of a training command before torch is imported: its paths, its data's first rows, its folder."""

from __future__ import annotations

from collections.abc import Sequence

from tutelage.cli.config_file import read_fields
from tutelage.cli.output import OutputFolder
from tutelage.cli.parser import CommandParser, columns_of, take_config
from tutelage.data.columns import check_demonstrations, check_prompts
from tutelage.errors import UserError
from tutelage.launch import check_launch, process_index
from tutelage.models.paths import require_model
from tutelage.ranges import whole

__all__ = ["check_training"]


def check_training(command: str, args: Sequence[str]) -> None:
    """Refuse at once what would be refused later, after seconds of imports.

    Only what is surely wrong is refused; the whole command line is parsed afterwards, with its own errors.

    Raises:
        UserError: a path to nothing, a folder without a model, a data file whose first rows are no demonstrations, a
            verifier without its rows, an output folder in use, or a launcher that did not start what it was asked
            for.
    """
    path, args = take_config(args)
    args = [*_simple_values(path), *args]
    if not {"-h", "--help", "--help_all"}.isdisjoint(args):
        return
    check_launch()
    parser = CommandParser(prog=f"tutelage {command}", add_help=False, allow_abbrev=False)
    paths = ("model_name_or_path", "dataset_name", "eval_dataset_name", "retention_dataset", "output_dir")
    rewards = ("reward_model_name_or_path", "init_reward_from")
    others = ("preference_dataset", "validation_dataset", "prompt_dataset", "base_model_name_or_path")
    for name in (*paths, *others, *rewards, "retention_verifier"):
        parser.add_argument(f"--{name}")
    read = (*paths, *others, *rewards)
    parser.add_argument("--dataset_train_split", default="train", help="")
    parser.add_argument("--turns", default="last", help="")
    parser.add_argument("--eval_rows", type=whole(1))
    for name in ("prompt_column", "completion_column", "messages_column"):
        parser.add_argument(f"--{name}")
    for name in ("resume", "overwrite_output_dir", "dataset_streaming"):
        parser.add_argument(f"--{name}", nargs="?", const="true", default="false", help="")
    found, _ = parser.parse_known_args([_underscored(arg) for arg in args])
    for name in (found.model_name_or_path, found.base_model_name_or_path):
        if name:
            require_model(name)
    if found.output_dir and process_index() == 0:
        OutputFolder(
            found.output_dir,
            resume=_is(found.resume),
            overwrite=_is(found.overwrite_output_dir),
            reads={"config": path, **{name: getattr(found, name) for name in read if name != "output_dir"}},
        )
    if found.retention_verifier and not found.retention_dataset:
        raise UserError(
            "has no rows to score answers to.", remedy="Add --retention_dataset DATA.", field="retention_verifier"
        )
    if found.turns not in ("last", "all"):
        return
    columns = columns_of(found)
    if found.dataset_name:
        # A streamed file is read as far as the run goes: only its first row is sure to be met.
        limit = 1 if _is(found.dataset_streaming) else None
        split = found.dataset_train_split
        check_demonstrations(found.dataset_name, split=split, turns=found.turns, limit=limit, columns=columns)
    for source, limit in (
        (found.eval_dataset_name, found.eval_rows),
        (found.preference_dataset, None),
        (found.validation_dataset, None),
        (found.retention_dataset, found.eval_rows),
    ):
        if source:
            check_demonstrations(source, turns=found.turns, limit=limit, columns=columns)
    if found.prompt_dataset:
        check_prompts(found.prompt_dataset, turns=found.turns, columns=columns)


def _simple_values(path: str | None) -> list[str]:
    """Texts, numbers and flags of a config file as arguments; nothing of a file that cannot be read, which parsing tells."""
    if path is None:
        return []
    try:
        found = read_fields(path)
    except UserError:
        return []
    return [f"--{name}={entry.text}" for name, entry in found.items() if isinstance(entry.text, str)]


def _underscored(arg: str) -> str:
    """--dataset-name as --dataset_name: transformers takes both."""
    if not arg.startswith("--"):
        return arg
    name, equals, value = arg.partition("=")
    return name[:2] + name[2:].replace("-", "_") + equals + value


def _is(value: str) -> bool:
    return value.lower() in ("true", "t", "yes", "y", "1", "on")
