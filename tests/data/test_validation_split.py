"""Validation rows and what remains to train on."""

import pytest
from datasets import Dataset

from tutelage.data import Tokenization, split_validation, tokenize_dataset
from tutelage.errors import UserError
from tutelage.testing.tokenizers import tiny_tokenizer


def rows(count):
    return [{"prompt": f"Is {i} even?", "completion": " Yes", "number": i} for i in range(count)]


def split(data, **options):
    tokenization = Tokenization(tiny_tokenizer("zephyr"))
    tokenized = tokenize_dataset(data, tokenization)
    return (*split_validation(data, tokenized, tokenization, **{"seed": 0, **options}), tokenization)


def numbers(raw):
    return [row["number"] for row in raw]


@pytest.mark.parametrize(("count", "kept"), [(40, 16), (200, 20), (1300, 128)])
def test_how_many(count, kept):
    raw, left, _ = split(Dataset.from_list(rows(count)))
    assert len(raw) == kept
    assert sorted([*numbers(raw), *(row["row"] for row in left)]) == list(range(count))


def test_the_seed_decides_which_and_columns_stay():
    data = Dataset.from_list(rows(40))
    first, again, other = (numbers(split(data, rows=10, seed=seed)[0]) for seed in (0, 0, 1))
    assert first == again != other
    assert len(set(first)) == 10


def test_a_prompt_in_several_rows_is_on_one_side():
    data = Dataset.from_list([*rows(20), *[{**row, "completion": " No"} for row in rows(20)]])
    raw, left, tokenization = split(data, rows=8)
    prompts = {tokenization.prompt_ids(row["prompt"]) for row in raw}
    assert prompts.isdisjoint(tuple(row["prompt_ids"]) for row in left)
    assert len(left) == 40 - 2 * len(prompts)


def test_a_stream_gives_its_first_rows():
    data = Dataset.from_list(rows(20)).to_iterable_dataset()
    raw, left, _ = split(data, rows=5)
    assert numbers(raw) == list(range(5))
    assert [row["row"] for row in left] == list(range(5, 20))


def test_every_turn_of_a_validation_row_is_kept_from_training():
    talks = [
        {"messages": [{"role": r, "content": f"{i} {turn} {r}"} for turn in range(2) for r in ("user", "assistant")]}
        for i in range(12)
    ]
    data, tokenization = Dataset.from_list(talks), Tokenization(tiny_tokenizer("zephyr"))
    tokenized = tokenize_dataset(data, tokenization, turns="all")
    raw, left = split_validation(data, tokenized, tokenization, rows=4, seed=0, turns="all")
    assert (len(raw), len(left)) == (4, 16)


def test_too_few_rows():
    with pytest.raises(UserError, match="4 of 7 rows would be held out as validation rows"):
        split(Dataset.from_list(rows(7)), rows=4)
    with pytest.raises(UserError, match="every row is also a validation row"):
        split(Dataset.from_list(rows(1) * 20), rows=4)
