"""Prompts without demonstrations: how they are read, numbered and mixed with those of demonstrations."""

import pytest
from datasets import Dataset

from tutelage.data.prompts import mix_prompts, tokenize_prompts
from tutelage.data.tokenization import Tokenization
from tutelage.data.tokenized import group_from_row, tokenize_dataset
from tutelage.errors import UserError
from tutelage.testing.tokenizers import tiny_tokenizer

PROMPTS = ["What is 1 + 1?", "What is the answer to this?", "Yes?"]
CHATS = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
ANSWERED = [
    {"prompt": prompt, "completion": " no" if row else " the answer is " * 50} for row, prompt in enumerate(PROMPTS)
]


def tokenization(**options):
    return Tokenization(tiny_tokenizer("zephyr"), max_completion_length=8, **options)


def read(rows, *, first_row=7, conversational=False, held_out=None, **options):
    data = Dataset.from_list(rows)
    return tokenize_prompts(
        data,
        tokenization(**options),
        first_row=first_row,
        conversational=conversational,
        held_out=held_out,
        source="prompts.jsonl",
    )


@pytest.mark.parametrize(
    "rows",
    [
        [{"prompt": prompt} for prompt in PROMPTS],
        [{"prompt": prompt, "other": 1} for prompt in PROMPTS],
        ANSWERED,
        [{"prompt": prompt, "chosen": " yes", "rejected": " no"} for prompt in PROMPTS],
    ],
    ids=["prompts", "another column", "demonstrations", "preferences"],
)
def test_prompts_alone_remain(rows):
    found = [group_from_row(row) for row in read(rows)]
    tokens = tokenization()
    assert [group.prompt_ids for group in found] == [tokens.prompt_ids(prompt) for prompt in PROMPTS]
    assert [group.row for group in found] == [7, 8, 9]
    assert all(not group.completions for group in found)


def test_conversations():
    rows = [{"messages": [*chat, {"role": "assistant", "content": "no"}]} for chat in CHATS]
    found = [
        [group_from_row(row) for row in read(given, conversational=True)]
        for given in (rows, [{"prompt": chat} for chat in CHATS])
    ]
    tokens = tokenization()
    for groups in found:
        assert [group.prompt_ids for group in groups] == [tokens.prompt_ids(chat) for chat in CHATS]


@pytest.mark.parametrize(
    ("rows", "conversational", "said"),
    [
        (
            [{"prompt": chat} for chat in CHATS],
            False,
            "the prompt is a conversation, and the demonstrations have text",
        ),
        ([{"prompt": prompt} for prompt in PROMPTS], True, "the prompt is text, and the demonstrations have a conv"),
    ],
)
def test_prompts_of_another_kind_than_the_demonstrations(rows, conversational, said):
    with pytest.raises(UserError, match=rf"prompts.jsonl, row 1, field 'prompt': {said}.*in the form of"):
        read(rows, conversational=conversational)


def test_held_out_prompts_are_refused():
    held_out = {tokenization().prompt_ids(PROMPTS[1]): "validation rows"}
    with pytest.raises(
        UserError, match=r"prompts.jsonl, row 2, field 'prompt': .* one of the validation rows.*Leave the row out"
    ):
        read([{"prompt": prompt} for prompt in PROMPTS], held_out=held_out)
    assert len(read([{"prompt": prompt} for prompt in PROMPTS[::2]], held_out=held_out)) == 2


@pytest.mark.parametrize("answered", [False, True])
def test_prompts_that_are_too_long(answered, caplog):
    rows = ANSWERED if answered else [{"prompt": prompt} for prompt in PROMPTS]
    limit = len(tokenization().prompt_ids(PROMPTS[0]))
    assert len(tokenization().prompt_ids(PROMPTS[1])) > limit
    with pytest.raises(UserError, match=r"prompts.jsonl, row 2.*: the prompt has"):
        read(rows, max_prompt_length=limit)
    caplog.clear()
    found = read(rows, max_prompt_length=limit, on_long_prompt="drop")
    assert list(found["row"]) == [7, 9]
    assert "prompts.jsonl: left out 1 of 3" in caplog.text
    with pytest.raises(UserError, match=r"prompts.jsonl: no prompt remains"):
        read(rows, max_prompt_length=1, on_long_prompt="drop")


@pytest.mark.parametrize("bad", ["", 3, [], [{"role": "assistant", "content": "no"}]], ids=repr)
def test_rows_that_hold_no_prompt(bad):
    with pytest.raises(UserError, match=r"prompts.jsonl, row 1, field 'prompt"):
        read([{"prompt": bad}], conversational=isinstance(bad, list))


def test_columns_without_prompts():
    with pytest.raises(UserError, match=r"prompts.jsonl: the columns 'question' match no known format"):
        read([{"question": "Yes?"}])


def demonstrations(count=4):
    rows = [{"prompt": f"What is {i}?", "completion": " no"} for i in range(count)]
    return tokenize_dataset(Dataset.from_list(rows), tokenization())


@pytest.mark.parametrize(("share", "wanted"), [(None, 4), (1.0, 0), (0.5, 6), (0.75, 2), (0.4, 9)])
def test_the_share_of_prompts(share, wanted):
    rows, alone = demonstrations(), read([{"prompt": f"Yes? {i}"} for i in range(6)], first_row=4)
    found = mix_prompts(rows, alone, share=share, seed=0)
    assert sorted(row for row in found["row"] if row >= 4) == [4, 5, 6, 7, 8, 9]
    taken = [row for row in found["row"] if row < 4]
    assert len(taken) == wanted
    assert not taken or max(map(taken.count, range(4))) - min(map(taken.count, range(4))) <= 1
    assert [bool(group_from_row(row).completions) for row in found] == [row < 4 for row in found["row"]]


def test_the_seed_decides_which_demonstrations_are_taken():
    rows, alone = demonstrations(20), read([{"prompt": f"Yes? {i}"} for i in range(6)], first_row=20)
    found = [list(mix_prompts(rows, alone, share=0.6, seed=seed)["row"]) for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]
