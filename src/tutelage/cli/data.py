"""tutelage data: what the model will see of a dataset."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from tutelage.cli.parser import column_arguments, columns_of, command_parser, length_arguments
from tutelage.data.columns import check_demonstrations
from tutelage.models.paths import require_model

__all__ = ["main"]


def main(args: Sequence[str], console: Console) -> None:
    """Show what the model will see of a dataset."""
    parser = command_parser("data", main.__doc__, column_arguments, length_arguments)
    parser.add_argument("dataset_name", metavar="DATA", help="A hub name, a folder or a file.")
    parser.add_argument("--dataset_config", help="Configuration of a hub dataset.")
    parser.add_argument("--split", default="train", help="Split of the dataset.")
    parser.add_argument("--turns", default="last", choices=["last", "all"], help="Which assistant turns are taken.")
    parser.add_argument(
        "--on_long_prompt",
        default="error",
        choices=["error", "drop"],
        help="What training would do: stop, or drop the row.",
    )
    parser.add_argument("--model_name_or_path", required=True, help="Whose tokenizer to use.")
    parser.add_argument("--trust_remote_code", action="store_true", help="Run code that comes with the model.")
    options = parser.parse_args(args)
    require_model(options.model_name_or_path)
    columns = columns_of(options)
    check_demonstrations(options.dataset_name, split=options.split, turns=options.turns, columns=columns)
    # Imported now that the arguments are good: it takes seconds.
    from tutelage.cli.libraries import quiet_libraries
    from tutelage.data import Tokenization, inspect_dataset, load_dataset, print_inspection
    from tutelage.models.tokenizer import load_tokenizer

    quiet_libraries()
    tokenization = Tokenization(
        load_tokenizer(options.model_name_or_path, trust_remote_code=options.trust_remote_code),
        options.max_prompt_length,
        options.max_completion_length,
        options.on_long_prompt,
        columns=columns,
    )
    dataset = load_dataset(options.dataset_name, config_name=options.dataset_config, split=options.split)
    found = inspect_dataset(dataset, tokenization, turns=options.turns, source=options.dataset_name)
    print_inspection(found, console)
