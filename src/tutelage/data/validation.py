"""Validation rows: kept from training, so that what was trained can be judged on them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from datasets import Dataset, IterableDataset

from tutelage.data.demonstrations import Turns
from tutelage.data.origin import selected
from tutelage.data.tables import table_of
from tutelage.data.tokenization import Tokenization
from tutelage.data.tokenized import tokenized_rows
from tutelage.errors import UserError

__all__ = ["split_validation", "without_prompts"]


def split_validation(
    dataset: Dataset | IterableDataset,
    tokenized: Any,
    tokenization: Tokenization,
    *,
    rows: int | None = None,
    seed: int,
    turns: Turns = "last",
    source: str = "dataset",
) -> tuple[Dataset, Any]:
    """Take validation rows out of the training data.

    Args:
        dataset: the training data as they were read.
        tokenized: the same after ``tokenize_dataset``.
        rows: how many; by default a tenth, at least 16 and at most 128, and 64 of streamed data.
        seed: decides which; streamed data give their first ones.
        turns, source: as for ``tokenize_dataset``.

    Returns:
        the validation rows as they were read, with all their columns, and the tokenized data without their prompts. A prompt
        that occurs in several rows is in neither or both of them.

    Raises:
        UserError: more than half would be validation rows, or nothing would remain to train on.
    """
    if isinstance(dataset, IterableDataset):
        first = list(dataset.take(rows or 64))
        raw = table_of(first) if hasattr(dataset, "origin") else Dataset.from_list(first)
    else:
        wanted = rows or max(16, min(128, len(dataset) // 10))
        if wanted > len(dataset) // 2:
            raise UserError(
                f"{wanted} of {len(dataset)} rows would be held out as validation rows.",
                remedy="Give more data, or lower --validation_rows.",
                file=source,
                field="validation_rows",
            )
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
        raw = selected(dataset, sorted(order[:wanted]))
    prompts = {row.group.prompt_ids for row in tokenized_rows(raw, tokenization, turns=turns, source=source)}

    return raw, without_prompts(tokenized, prompts, source=source)


def without_prompts(tokenized: Any, prompts: Collection[tuple[int, ...]], *, source: str = "dataset") -> Any:
    """Tokenized data without the rows of some prompts.

    Raises:
        UserError: nothing would remain of map-style data.
    """

    def trains(row: Mapping[str, Any]) -> bool:  # by content: a stream may repeat, a prompt may have several answers
        return tuple(row["prompt_ids"]) not in prompts

    if isinstance(tokenized, IterableDataset):
        return tokenized.filter(trains)
    left = tokenized.select([place for place, row in enumerate(tokenized) if trains(row)])
    if not len(left):
        raise UserError("every row is also a validation row.", remedy="Give more different rows.", file=source)
    return left
