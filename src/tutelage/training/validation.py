"""Rows kept from training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from datasets import Dataset, IterableDataset

from tutelage.data.demonstrations import Turns
from tutelage.data.tokenization import Tokenization
from tutelage.errors import UserError
from tutelage.evaluation.policy import EvaluationSet

__all__ = ["split_validation"]


def split_validation(
    dataset: Dataset | IterableDataset,
    tokenized: Any,
    tokenization: Tokenization,
    *,
    rows: int | None,
    seed: int,
    turns: Turns,
    verifier: str | None,
    source: str,
) -> tuple[EvaluationSet, Any]:
    """Keep some rows from training.

    Args:
        dataset: the training data as they were read, which a verifier needs.
        tokenized: the same after ``tokenize_dataset``.
        rows: how many; by default a tenth, at least 16 and at most 128, and 64 of streamed data.
        seed: decides which; streamed data give their first ones.
        turns, verifier, source: as for ``EvaluationSet.of``.

    Returns:
        the validation rows, and the tokenized data without their prompts.

    Raises:
        UserError: more than half would be kept, or nothing would remain.
    """
    if isinstance(dataset, IterableDataset):
        raw = Dataset.from_list(list(dataset.take(rows or 64)))
    else:
        wanted = rows or max(16, min(128, len(dataset) // 10))
        if wanted > len(dataset) // 2:
            raise UserError(
                f"{wanted} of {len(dataset)} rows would be kept from training.",
                remedy="Give more data, or lower --validation_rows.",
                file=source,
                field="validation_rows",
            )
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
        raw = dataset.select(sorted(order[:wanted]))
    kept_rows = EvaluationSet.of(raw, tokenization, verifier=verifier, turns=turns, source=source)
    kept = {group.prompt_ids for group in kept_rows.groups}

    def trains(row: Mapping[str, Any]) -> bool:  # by content: a stream may repeat, a prompt may have several answers
        return tuple(row["prompt_ids"]) not in kept

    if isinstance(dataset, IterableDataset):
        return kept_rows, tokenized.filter(trains)
    left = tokenized.select([place for place, row in enumerate(tokenized) if trains(row)])
    if not len(left):
        raise UserError(
            "every row is also among those kept from training.", remedy="Give more different rows.", file=source
        )
    return kept_rows, left
