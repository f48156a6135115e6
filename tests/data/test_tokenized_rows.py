"""The one way from rows to groups, and the prompts of a dataset with and without answers."""

import pytest
from datasets import Dataset

from tutelage.data import (
    DataSummary,
    Tokenization,
    group_from_row,
    inspect_dataset,
    preference_group_from_row,
    read_rows,
    tokenize_dataset,
    tokenized_prompts,
    tokenized_rows,
)
from tutelage.errors import UserError
from tutelage.testing.tokenizers import tiny_tokenizer

ROWS = [
    {"prompt": "2 + 2?", "chosen": " The answer is 4", "rejected": " 5", "level": 1},
    {"prompt": "How many apples are there? How many are there? " * 3, "chosen": " 3", "rejected": " 4", "level": 2},
    {"prompt": "Yes?", "chosen": " The answer is no", "rejected": " The answer is yes", "level": 3},
]


def tokenization(**settings):
    return Tokenization(tiny_tokenizer("zephyr"), **{"max_prompt_length": 20, "on_long_prompt": "drop", **settings})


@pytest.mark.parametrize("streamed", [False, True])
def test_rows_come_with_their_groups_and_are_counted(streamed):
    data, tokens, summary = Dataset.from_list(ROWS), tokenization(), DataSummary()
    rows = list(tokenized_rows(data.to_iterable_dataset() if streamed else data, tokens, summary=summary))
    kept = [ROWS[0], ROWS[2]]
    assert [row.demonstration.fields for row in rows] == kept
    assert [row.group.row for row in rows] == [0, 2]
    for row, source in zip(rows, kept, strict=True):
        assert row.group.prompt_ids == tokens.prompt_ids(source["prompt"])
        assert tokens.text(row.group.completions[0].token_ids) == source["chosen"]
        assert [tokens.text(c.token_ids) for c in row.pair.completions] == [source["chosen"], source["rejected"]]
    assert (summary.rows, summary.demonstrations, summary.pairs, summary.long_prompts) == (3, 2, 2, 1)


def test_the_tokenized_data_set_holds_the_same_groups():
    data, tokens = Dataset.from_list(ROWS), tokenization()
    columns = list(tokenize_dataset(data, tokens))
    rows = list(tokenized_rows(data, tokens))
    assert [group_from_row(row) for row in columns] == [row.group for row in rows]
    assert [preference_group_from_row(row) for row in columns] == [row.pair for row in rows]


def test_answers_that_are_equal_once_truncated_are_no_pair():
    tokens = tokenization(max_completion_length=3)
    first, last = tokenized_rows(Dataset.from_list(ROWS), tokens)
    assert first.pair is not None
    assert last.pair is None
    found = inspect_dataset(Dataset.from_list(ROWS), tokens).summary
    assert (found.demonstrations, found.pairs, found.truncated, found.long_prompts) == (2, 1, 2, 1)


@pytest.mark.parametrize(
    "limits", [{}, {"max_completion_length": 2}, {"max_prompt_length": 6}, {"max_prompt_length": 500}]
)
def test_an_inspection_counts_what_training_would_see(limits):
    data, tokens, summary = Dataset.from_list(ROWS), tokenization(**limits), DataSummary()
    rows = list(tokenized_rows(data, tokens, summary=summary))
    found = inspect_dataset(data, tokens)
    assert found.summary == summary
    for example, row in zip(found.examples, rows, strict=True):
        assert example.finished == row.group.completions[0].finished
        shown = "".join(segment.text for segment in example.completion)
        assert shown == tokens.text(row.group.completions[0].token_ids, skip_special_tokens=False)


def test_an_inspection_tokenizes_each_demonstration_once(monkeypatch):
    data, tokens, calls = Dataset.from_list(ROWS[:1]), tokenization(), []
    group = Tokenization.group
    monkeypatch.setattr(Tokenization, "group", lambda *args, **options: calls.append(1) or group(*args, **options))
    inspect_dataset(data, tokens)
    assert len(calls) == 1


# --- prompts -----------------------------------------------------------------------------------------------------------


def test_prompts_of_demonstrations_come_with_them():
    data, tokens = Dataset.from_list(ROWS), tokenization()
    prompts = list(tokenized_prompts(data, tokens))
    groups = [row.group for row in tokenized_rows(data, tokens)]
    assert [prompt.group for prompt in prompts] == list(groups)
    assert not any(prompt.conversational for prompt in prompts)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("conversational", [False, True])
def test_prompts_alone(streamed, conversational):
    texts = ["Is 2 even?", ROWS[1]["prompt"], "Yes?"]
    asked = [[{"role": "user", "content": text}] for text in texts] if conversational else texts
    data = Dataset.from_list([{"prompt": prompt} for prompt in asked])
    limit = max(len(tokenization().prompt_ids(asked[row])) for row in (0, 2))
    tokens = tokenization(max_prompt_length=limit)
    prompts = list(tokenized_prompts(data.to_iterable_dataset() if streamed else data, tokens))
    assert [prompt.group.row for prompt in prompts] == [0, 2]
    assert [prompt.group.prompt_ids for prompt in prompts] == [
        tokens.prompt_ids(asked[0]),
        tokens.prompt_ids(asked[2]),
    ]
    assert {(prompt.conversational, prompt.group.completions) for prompt in prompts} == {(conversational, ())}
    with pytest.raises(UserError, match=r"p.jsonl, row 2, field 'prompt': the prompt has"):
        list(tokenized_prompts(data, tokenization(max_prompt_length=limit, on_long_prompt="error"), source="p.jsonl"))
    with pytest.raises(UserError, match="no known format"):
        list(read_rows(data))


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        (["Yes?", ""], "row 2, field 'prompt': is empty"),
        (["Yes?", None], "row 2, field 'prompt': is missing"),
        ([[{"role": "assistant", "content": "?"}]], "row 1, field 'prompt'.*from the user"),
    ],
)
def test_prompts_that_are_none(prompts, said):
    with pytest.raises(UserError, match=said):
        list(tokenized_prompts(Dataset.from_list([{"prompt": prompt} for prompt in prompts]), tokenization()))
