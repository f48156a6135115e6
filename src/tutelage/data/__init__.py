"""Demonstrations: load, check, tokenize and inspect them."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tutelage.data.demonstrations import (
        Columns,
        Demonstration,
        detect_format,
        is_conversational,
        read_row,
        read_rows,
    )
    from tutelage.data.inspection import Inspection, inspect_dataset, print_inspection
    from tutelage.data.loading import load_dataset
    from tutelage.data.tokenization import Tokenization
    from tutelage.data.tokenized import (
        DataSummary,
        TokenizedPrompt,
        TokenizedRow,
        group_from_row,
        preference_group_from_row,
        tokenize_dataset,
        tokenized_prompts,
        tokenized_rows,
    )
    from tutelage.data.validation import split_validation

# Imported when asked for: a file can be checked before datasets and torch are imported, which takes seconds.
_HOMES = {
    "tutelage.data.demonstrations": [
        "Columns",
        "Demonstration",
        "detect_format",
        "is_conversational",
        "read_row",
        "read_rows",
    ],
    "tutelage.data.inspection": ["Inspection", "inspect_dataset", "print_inspection"],
    "tutelage.data.loading": ["load_dataset"],
    "tutelage.data.tokenization": ["Tokenization"],
    "tutelage.data.tokenized": [
        "DataSummary",
        "TokenizedPrompt",
        "TokenizedRow",
        "group_from_row",
        "preference_group_from_row",
        "tokenize_dataset",
        "tokenized_prompts",
        "tokenized_rows",
    ],
    "tutelage.data.validation": ["split_validation"],
}

__all__ = [
    "Columns",
    "DataSummary",
    "Demonstration",
    "Inspection",
    "Tokenization",
    "TokenizedPrompt",
    "TokenizedRow",
    "detect_format",
    "group_from_row",
    "inspect_dataset",
    "is_conversational",
    "load_dataset",
    "preference_group_from_row",
    "print_inspection",
    "read_row",
    "read_rows",
    "split_validation",
    "tokenize_dataset",
    "tokenized_prompts",
    "tokenized_rows",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"module 'tutelage.data' has no attribute {name!r}")
