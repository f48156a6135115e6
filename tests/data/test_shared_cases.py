"""Small inputs that went wrong in other tools: each is read as it should be, or refused with one error."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tutelage.data import Tokenization, load_dataset, tokenized_prompts, tokenized_rows
from tutelage.errors import UserError

CASES = Path(__file__).resolve().parents[2].parent / "shared" / "cases"


def shared(name: str) -> Path:
    path = CASES / name
    if not path.exists():
        pytest.skip(f"{path} is not here")
    return path


def tokenization_of(template: str = "chatml", **settings) -> Tokenization:
    """A byte-level tokenizer whose end of text is not the end of a turn."""
    special = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*special, *alphabet])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    tokenizer.chat_template = shared(f"templates/{template}.jinja").read_text()
    return Tokenization(tokenizer, **settings)


READ = {
    "bigint.jsonl": ["a -> b</s>"],
    "bom_array.json": ["3 + 4 = ->  7</s>", "5 + 5 = ->  10</s>"],
    "bom_array_oneline.json": ["3 + 4 = ->  7</s>", "5 + 5 = ->  10</s>"],
    "json_list_lens.jsonl": ["a -> b</s>"] * 2,
    "json_meta.jsonl": ["a -> b</s>"] * 4,
    "json_top.jsonl": ["a -> b</s>"] * 3,
    "kto.jsonl": ["Is water wet? ->  Yes.</s>"],
    "llamafactory_alpaca.jsonl": [
        "<|im_start|>system\nYou are a calculator.<|im_end|>\n<|im_start|>user\n3 + 4?<|im_end|>\n"
        "<|im_start|>assistant\n7<|im_end|>\n<|im_start|>user\nAnd times two?<|im_end|>\n<|im_start|>assistant\n"
        " -> 14<|im_end|>"
    ],
    "mixed_ids.jsonl": ["a -> b</s>"] * 2,
    "na_folder": ["Is it there? -> NA</s>", "And here? -> None</s>", "Now? -> null</s>"],
    "reasoning.jsonl": [
        "<|im_start|>user\n3 + 4?<|im_end|>\n<|im_start|>assistant\n -> <think>\nadd\n</think>\n\n7<|im_end|>"
    ],
    "shards": ["a -> b</s>"] * 2,
    "shards_types": ["a -> b</s>"] * 2,
    "sharegpt.jsonl": ["<|im_start|>user\n3 + 4?<|im_end|>\n<|im_start|>assistant\n -> 7<|im_end|>"],
    "sharegpt_renamed.jsonl": ["<|im_start|>user\n3 + 4?<|im_end|>\n<|im_start|>assistant\n -> 7<|im_end|>"],
    "system_col.jsonl": [
        "<|im_start|>system\nYou are a pirate.<|im_end|>\n<|im_start|>user\nHello?<|im_end|>\n<|im_start|>assistant\n"
        " ->  Arr.<|im_end|>"
    ],
}
REFUSED = {
    "mixed_content.jsonl": "row 2, field 'messages': the content of message 1 must be text, not list",
    "p_asst.jsonl": "row 1, field 'prompt': the last message of a prompt must be from the user",
    "p_list.jsonl": "row 1, field 'prompt': message 1 must be an object",
    "p_noneconten.jsonl": "row 1, field 'prompt': the content of message 1 is missing",
    "p_null.jsonl": "row 2, field 'prompt': is missing",
    "p_num.jsonl": "row 1, field 'prompt': must be text, not int",
    "p_parts.jsonl": "row 1, field 'prompt': the content of message 1 must be text, not list",
    "p_tool.jsonl": "row 1, field 'prompt': message 2 has the role 'tool'",
    "p_ws.jsonl": "row 1, field 'prompt': is empty",
    "stringified_prompt.jsonl": "row 1, field 'prompt': is a list of messages written as text",
    "surrogate.jsonl": "row 1, field 'completion': is no Unicode text",
    "toolcall_last.jsonl": "row 1, field 'messages': message 2 has 'tool_calls'",
}


def seen(path: Path, tokenization: Tokenization) -> list[str]:
    """Each row as text with its special tokens, prompt and completion."""
    rows = tokenized_rows(load_dataset(path), tokenization, source=str(path))
    texts = [
        [tokenization.text(ids, False) for ids in (g.prompt_ids, g.completions[0].token_ids)]
        for g in (r.group for r in rows)
    ]
    return [" -> ".join(both) for both in texts]


@pytest.mark.parametrize("name", READ)
def test_rows_are_read_as_their_formats_mean(name):
    assert seen(shared(f"data/{name}"), tokenization_of()) == READ[name]


@pytest.mark.parametrize("name", REFUSED)
def test_other_rows_are_one_error_with_row_and_column(name):
    path = shared(f"data/{name}")
    read = tokenized_prompts if name.startswith("p_") else tokenized_rows
    with pytest.raises(UserError, match=re.escape(f"{path}, {REFUSED[name]}")):
        list(read(load_dataset(path), tokenization_of(), source=str(path)))


def test_every_case_is_known():
    assert {path.name for path in shared("data").iterdir()} <= READ.keys() | REFUSED.keys()


def test_unused_columns_keep_their_values():
    assert [row["answer"] for row in load_dataset(shared("data/json_top.jsonl"))] == [["1"], "42", "null"]
    meta = [row["meta"] for row in load_dataset(shared("data/json_meta.jsonl"))]
    assert [(each["answer"], each["v"]) for each in meta] == [("007", 1), ("42", "x"), ("1e5", "true"), ('"q"', None)]
    assert [row["answer"] for row in load_dataset(shared("data/na_folder"))] == ["0042", "007", "1e5"]


def test_templates():
    chat, reasoning = shared("chat.jsonl"), shared("data/reasoning.jsonl")
    assert (
        seen(chat, tokenization_of("parts"))[0] == "<|im_start|>user: 73 + 29?<|im_end|>\nAssistant: -> 102<|im_end|>"
    )
    assert seen(chat, tokenization_of("chatml"))[0].endswith("assistant\n -> 102<|im_end|>")
    assert seen(reasoning, tokenization_of("open_think")) == ["<s>[U]3 + 4?[A]<think>\n -> add\n</think>\n\n7</s>"]
    with pytest.raises(UserError, match="row 1: the chat template opens a <think> block"):
        seen(chat, tokenization_of("open_think"))
    date = tokenization_of("date")
    assert date.now.strftime("Today: %d %b %Y %H:%M") in seen(chat, date)[0]


def test_hostile_text_is_text():
    path = shared("hostile.jsonl")
    tokenization = tokenization_of()
    for row, text in zip(load_dataset(path), seen(path, tokenization), strict=True):
        assert text == f"{row['prompt']} -> {row['completion']}</s>"
