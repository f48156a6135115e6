"""Demonstrations: load and check them, turn them into tokens, look at them."""

from tutelage.data.demonstrations import Demonstration, detect_format, is_conversational, read_row, read_rows
from tutelage.data.inspection import Inspection, inspect_dataset, print_inspection
from tutelage.data.loading import load_dataset
from tutelage.data.tokenization import (
    DataSummary,
    Tokenization,
    TokenizedPrompt,
    TokenizedRow,
    group_from_row,
    preference_group_from_row,
    tokenize_dataset,
    tokenized_prompts,
    tokenized_rows,
)
from tutelage.data.validation import split_validation

__all__ = [
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
