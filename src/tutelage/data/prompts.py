"""Prompts without demonstrations: what a policy may sample for although nobody wrote an answer."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import cast

import torch
from datasets import Dataset, concatenate_datasets

from tutelage.data.origin import located
from tutelage.data.tokenization import Tokenization
from tutelage.data.tokenized import FEATURES, row_of_group, tokenized_prompts
from tutelage.errors import UserError
from tutelage.groups import Group

__all__ = ["mix_prompts", "tokenize_prompts"]


def tokenize_prompts(
    dataset: Dataset,
    tokenization: Tokenization,
    *,
    first_row: int,
    conversational: bool,
    held_out: Mapping[tuple[int, ...], str] | None = None,
    source: str = "prompts",
) -> Dataset:
    """The prompts of a dataset in the columns of ``tokenize_dataset``, without answers.

    Args:
        dataset: rows with a ``prompt``, or of any recognized format; their answers are then left out.
        first_row: number that the first row gets, so that rows differ from those of the demonstrations.
        conversational: whether the demonstrations are conversations; prompts must be of the same kind, because the
            kind decides what ends an answer.
        held_out: prompts that nothing may be trained on, with what they are called.
        source: file or dataset, for messages to people.

    Raises:
        UserError: as ``tokenized_prompts``; a prompt of the other kind; a prompt that is held out; or no prompt remains.
    """
    rows, known = [], held_out or {}
    field = tokenization.columns.prompt or "prompt"
    for prompt in tokenized_prompts(dataset, tokenization, source=source):
        row = prompt.group.row
        if prompt.conversational != conversational:
            kinds = ("text", "a conversation")
            error = UserError(
                f"the prompt is {kinds[prompt.conversational]}, and the demonstrations have "
                f"{kinds[conversational]} there.",
                remedy="Give prompts in the form of the demonstrations.",
                file=source,
                row=row + 1,
                field=field,
            )
            raise located(error, dataset, row)
        if prompt.group.prompt_ids in known:
            error = UserError(
                f"the prompt is also one of the {known[prompt.group.prompt_ids]}, on which nothing may be trained.",
                remedy="Leave the row out.",
                file=source,
                row=row + 1,
                field=field,
            )
            raise located(error, dataset, row)
        rows.append(row_of_group(Group(prompt.group.prompt_ids, row=first_row + row)))
    if not rows:
        raise UserError("no prompt remains.", remedy="Give at least one that is short enough.", file=source)
    pieces = iter(rows)
    chunks = iter(lambda: list(islice(pieces, 1000)), [])
    return concatenate_datasets([Dataset.from_list(chunk, features=FEATURES) for chunk in chunks])


def mix_prompts(demonstrations: Dataset, prompts: Dataset, *, share: float | None, seed: int) -> Dataset:
    """What a policy phase draws its prompts from: prompts alone, and those of demonstrations.

    Args:
        demonstrations, prompts: tokenized; all prompts are in the result once.
        share: of the prompts alone among all; demonstrations are taken in the order of the seed, some of them or all
            of them several times, until the share is met. None takes every row of both once.
        seed: of the order of the demonstrations.

    >>> from datasets import Dataset
    >>> rows, alone = Dataset.from_dict({"row": [0, 1]}), Dataset.from_dict({"row": [2, 3, 4, 5, 6, 7]})
    >>> len(mix_prompts(rows, alone, share=None, seed=0)), len(mix_prompts(rows, alone, share=0.75, seed=0))
    (8, 8)
    >>> sorted(mix_prompts(rows, alone, share=1.0, seed=0)["row"])
    [2, 3, 4, 5, 6, 7]
    >>> sorted(mix_prompts(rows, alone, share=0.5, seed=0)["row"])
    [0, 0, 0, 1, 1, 1, 2, 3, 4, 5, 6, 7]
    """
    if share is None:
        return concatenate_datasets([demonstrations, prompts])
    wanted = round(len(prompts) * (1 - share) / share)
    generator = torch.Generator().manual_seed(seed)
    places: list[int] = []
    while len(places) < wanted:
        places += torch.randperm(len(demonstrations), generator=generator).tolist()
    if not wanted:
        return prompts
    return concatenate_datasets([cast(Dataset, demonstrations.select(places[:wanted])), prompts])
