"""Rows with several chosen or several rejected answers, as RewardBench 2 has them: to score, not to learn from."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tutelage.data.formats import read_prompt_alone
from tutelage.data.messages import Messages, Place, read_text
from tutelage.data.origin import located, numbered
from tutelage.errors import UserError
from tutelage.groups import Group, Role

if TYPE_CHECKING:
    from tutelage.data.tokenization import Tokenization
    from tutelage.data.tokenized import DataSummary

__all__ = ["Choice", "choice_groups", "holds_choices", "read_choices", "refuse_written_lists"]

_ANSWERS = ("chosen", "rejected")


@dataclass(frozen=True, slots=True)
class Choice:
    """A prompt with its right and its wrong answers.

    Attributes:
        row: the index of its row, from 0.
    """

    prompt: str | Messages
    chosen: tuple[str, ...]
    rejected: tuple[str, ...]
    row: int


def holds_choices(dataset: Any) -> bool:
    """Whether the first row has lists of texts as ``chosen`` and ``rejected`` (a list of messages is one answer)."""
    row = next(iter(dataset), {})
    return all(_is_list_of_texts(row.get(field)) for field in _ANSWERS)


def refuse_written_lists(dataset: Any, source: str) -> None:
    """CSV has no lists: refuse a first row whose ``chosen`` and ``rejected`` are lists written as text.

    Raises:
        UserError: they are.
    """
    row = next(iter(dataset), {})
    if all(_is_list_of_texts(_parsed(row.get(field))) for field in _ANSWERS):
        raise UserError(
            "holds lists of answers written as text, which would be scored with their brackets.",
            remedy="Write the rows as JSON lines or Parquet.",
            file=source,
            row=1,
            field="chosen",
        )


def _parsed(value: Any) -> Any:
    try:
        return ast.literal_eval(value.strip()) if isinstance(value, str) else None
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None


def read_choices(dataset: Any, *, source: str = "dataset") -> Iterator[Choice]:
    """The rows, in order.

    Raises:
        UserError: names source, row and field of a prompt or an answer that is missing, empty or no text.
    """
    for index, row in numbered(dataset, source):
        place = Place(source, index + 1)
        try:
            chosen, rejected = (_texts(row, place.at(field)) for field in _ANSWERS)
            yield Choice(read_prompt_alone(row, place), chosen, rejected, index)
        except UserError as error:
            raise located(error, dataset, index) from error


def choice_groups(dataset: Any, tokenization: Tokenization, *, source: str = "dataset") -> list[Group]:
    """Of each row the prompt with its answers as preferred and rejected ones; prompts that are too long as ``tokenization`` says.

    Raises:
        UserError: as ``read_choices`` and ``Tokenization.completion``; or nothing remains.
    """
    from tutelage.data.tokenized import DataSummary, log_dropped  # imports datasets, and rows can be checked without

    summary = DataSummary()
    groups = list(_groups(dataset, tokenization, source, summary))
    log_dropped(summary, source)
    if not groups:
        raise UserError(
            f"no row remains: all {summary.rows} prompts are too long.",
            remedy="Raise --max_prompt_length.",
            file=source,
        )
    return groups


def _groups(dataset: Any, tokenization: Tokenization, source: str, summary: DataSummary) -> Iterator[Group]:
    for choice in read_choices(dataset, source=source):
        summary.rows += 1
        try:
            if (prompt_ids := tokenization.short_prompt_ids(choice.prompt)) is None:
                summary.long_prompts += 1
                continue
            answers = [(text, Role.PREFERRED) for text in choice.chosen]
            answers += [(text, Role.REJECTED) for text in choice.rejected]
            completions = [tokenization.completion(choice.prompt, text, role) for text, role in answers]
        except UserError as error:
            error = UserError(error.problem, remedy=error.remedy, file=source, row=choice.row + 1, field=error.field)
            raise located(error, dataset, choice.row) from error
        yield Group(prompt_ids, tuple(completions), row=choice.row)


def _texts(row: Mapping[str, Any], place: Place) -> tuple[str, ...]:
    values = row.get(place.field)
    if not isinstance(values, list) or not values:
        raise place.error("must be a list of texts, as in the first row.", "Write one answer as a list of one.")
    return tuple(read_text(value, place, f"answer {number}") for number, value in enumerate(values, start=1))


def _is_list_of_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)
