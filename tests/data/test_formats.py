"""What columns mean: used as their formats say, or refused by name; nothing that changes a row is left out in silence."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest
from datasets import Dataset

from tutelage.data import Columns, Tokenization, detect_format, load_dataset, read_row, read_rows
from tutelage.data.demonstrations import holds_prompts_alone, read_prompts
from tutelage.data.inspection import inspect_dataset
from tutelage.data.tokenized import DataSummary, tokenized_prompts, tokenized_rows
from tutelage.errors import UserError
from tutelage.testing.tokenizers import tiny_tokenizer

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "2 + 2?"}
ASSISTANT = {"role": "assistant", "content": "4"}
THANKS = {"role": "user", "content": "Thanks."}

HUMAN = {"from": "human", "value": "2 + 2?"}
GPT = {"from": "gpt", "value": "4"}

FORMATS = {
    "ShareGPT": ({"conversations": [HUMAN, GPT]}, [USER], "4"),
    "ShareGPT with a system message": (
        {"conversations": [{"from": "system", "value": "Be brief."}, HUMAN, GPT]},
        [SYSTEM, USER],
        "4",
    ),
    "ShareGPT's messages elsewhere": ({"messages": [HUMAN, GPT]}, [USER], "4"),
    "messages as a table holds them": (
        {"conversations": [{**HUMAN, "role": None}, {**GPT, "tool_calls": None}]},
        [USER],
        "4",
    ),
    "OpenAI's messages in conversations": ({"conversations": [USER, ASSISTANT]}, [USER], "4"),
    "question and answer": ({"question": "2 + 2?", "answer": "4"}, "2 + 2?", "4"),
    "system": ({"system": "Be brief.", "prompt": "2 + 2?", "completion": "4"}, [SYSTEM, USER], "4"),
    "no system message in this row": ({"system": None, "prompt": "2 + 2?", "completion": "4"}, [USER], "4"),
    "system prompt": ({"system_prompt": "Be brief.", "question": "2 + 2?", "answer": "4"}, [SYSTEM, USER], "4"),
    "system beside messages": ({"system": "Be brief.", "messages": [USER, ASSISTANT]}, [SYSTEM, USER], "4"),
    "the same system message twice": (
        {"system": "Be brief.", "messages": [SYSTEM, USER, ASSISTANT]},
        [SYSTEM, USER],
        "4",
    ),
    "system and ShareGPT": (
        {"system": "Be brief.", "tools": "[]", "conversations": [HUMAN, GPT]},
        [SYSTEM, USER],
        "4",
    ),
    "history of pairs": (
        {"history": [["2 + 2?", "4"]], "instruction": "Thanks.", "input": "", "output": "Welcome.", "system": ""},
        [USER, ASSISTANT, THANKS],
        "Welcome.",
    ),
    "history of messages": (
        {"history": [USER, ASSISTANT], "prompt": "Thanks.", "completion": "Welcome."},
        [USER, ASSISTANT, THANKS],
        "Welcome.",
    ),
    "no history in this row": (
        {"history": [], "system": "Be brief.", "instruction": "Add.", "input": "2, 2", "output": "4"},
        [SYSTEM, {"role": "user", "content": "Add.\n\n2, 2"}],
        "4",
    ),
    "system in another spelling": (
        {"System": "Be brief.", "prompt": "2 + 2?", "completion": "4"},
        [SYSTEM, USER],
        "4",
    ),
    "system message": ({"system_message": "Be brief.", "prompt": "2 + 2?", "completion": "4"}, [SYSTEM, USER], "4"),
    "a dialogue as text without its system message": (
        {"system": "", "chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
        "\n\nHuman: a\n\nAssistant:",
        " b",
    ),
    "one message said both ways": ({"messages": [{**USER, **HUMAN}, {**ASSISTANT, **GPT}]}, [USER], "4"),
    "wanted": ({"prompt": "2 + 2?", "completion": "4", "label": True}, "2 + 2?", "4"),
    "wanted, in CSV": ({"prompt": "2 + 2?", "completion": "4", "label": "True"}, "2 + 2?", "4"),
    "a label of another kind": ({"prompt": "2 + 2?", "completion": "4", "label": "arithmetic"}, "2 + 2?", "4"),
    "unused columns": ({"prompt": "2 + 2?", "completion": "4", "id": 2**70, "x": [1, "2", {}]}, "2 + 2?", "4"),
    "weights of one": ({"messages": [USER, {**ASSISTANT, "weight": 1}]}, [USER], "4"),
}


@pytest.mark.parametrize(("row", "prompt", "completion"), FORMATS.values(), ids=FORMATS)
def test_columns_are_used_as_their_formats_mean(row, prompt, completion):
    (demonstration,) = read_row(row, number=1)
    assert (demonstration.prompt, demonstration.completion) == (prompt, completion)
    assert demonstration.fields == row


DIALOGUE = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}
WRITTEN = [json.dumps([USER]), str([USER]), json.dumps([HUMAN], indent=1), json.dumps(USER)]
REFUSED = [
    *[({"prompt": text, "completion": "4"}, "prompt", "messages written as text") for text in WRITTEN],
    ({"prompt": "a", "completion": str([ASSISTANT])}, "completion", "messages written as text"),
    ({"messages": json.dumps([USER, ASSISTANT])}, "messages", "messages written as text"),
    ({"conversations": json.dumps([HUMAN, GPT])}, "conversations", "messages written as text"),
    ({"chosen": str([USER, ASSISTANT]), "rejected": "b"}, "chosen", "messages written as text"),
    ({"history": "[['a', 'b']]", "prompt": "a", "completion": "b"}, "history", "must be a list of earlier turns"),
    ({"history": [["a"]], "prompt": "a", "completion": "b"}, "history", "turn 1 must be a pair"),
    ({"history": [["a", None]], "prompt": "a", "completion": "b"}, "history", "what the assistant said in turn 1"),
    ({"history": [USER], "prompt": "a", "completion": "b"}, "history", "does not end with the assistant's turn"),
    ({"system": 5, "prompt": "a", "completion": "b"}, "system", "must be text, not int"),
    ({"system": "A", "system_prompt": "B", "prompt": "a", "completion": "b"}, "system_prompt", "differs from"),
    ({"system": "A", "messages": [SYSTEM, USER, ASSISTANT]}, None, "begins with a system message"),
    ({"prompt": "a", "completion": "b", "label": 0}, "label", "answers that were not wanted"),
    *[
        ({"prompt": "a", "completion": "b", "label": label}, "label", "answers that were not wanted")
        for label in (1, -1, "0", " 1", "0.0", "undesirable", "Chosen")
    ],
    ({"prompt": "a", "completion": "b", "kto_tag": "0"}, "kto_tag", "answers that were not wanted"),
    ({"prompt": "a", "completion": "b", "Tools": [{"name": "w"}]}, "Tools", "would be left out"),
    ({"question": "a", "answer": "b", "Context": "c"}, "Context", "would be left out"),
    ({"system": "A", **DIALOGUE}, "system", "no place in a dialogue that is written as text"),
    ({"history": [["a", "b"]], **DIALOGUE}, "history", "no place in a dialogue that is written as text"),
    ({"messages": [USER, {**ASSISTANT, "train": "false"}]}, "messages", "not to be trained on ('train')"),
    ({"messages": [USER, {**ASSISTANT, "loss": False}]}, "messages", "not to be trained on ('loss')"),
    ({"messages": [USER, {**ASSISTANT, "refusal": "No."}]}, "messages", "message 2 has 'refusal'"),
    ({"messages": [USER, {**ASSISTANT, "value": "5"}]}, "messages", "both 'content' and 'value', and they differ"),
    ({"messages": [USER, {**ASSISTANT, "from": "human"}]}, "messages", "both 'role' and 'from', and they differ"),
    ({"prompt": "a", "completion": "b", "tools": [{"name": "w"}]}, "tools", "would be left out"),
    ({"messages": [USER, ASSISTANT], "tools": '[{"name": "w"}]'}, "tools", "would be left out"),
    ({"messages": [USER, ASSISTANT], "images": ["a.png"]}, "images", "would be left out"),
    ({"question": "a", "answer": "b", "context": "c"}, "context", "would be left out"),
    ({"question": "a", "answer": "b", "choices": ["c", "d"]}, "choices", "would be left out"),
    ({"messages": [USER, {**ASSISTANT, "tool_calls": [{"id": 1}]}]}, "messages", "message 2 has 'tool_calls'"),
    ({"messages": [USER, {**ASSISTANT, "reasoning_content": "r"}]}, "messages", "message 2 has 'reasoning_content'"),
    ({"messages": [USER, {**ASSISTANT, "weight": 0}]}, "messages", "not to be trained on ('weight')"),
    ({"messages": [USER, {"role": "assistant", "content": None}]}, "messages", "the content of message 2 is missing"),
    ({"conversations": [HUMAN, {"from": "function_call", "value": "{}"}, GPT]}, "conversations", "'function_call'"),
    ({"conversations": [HUMAN, {"from": ["gpt"], "value": "4"}]}, "conversations", "has the role ['gpt']"),
    ({"messages": [{"role": "human", "content": "a"}, ASSISTANT]}, "messages", "has the role 'human'"),
    ({"prompt": "a", "completion": ASSISTANT}, "completion", "not one object"),
    ({"prompt": "a", "completion": "b \ud83d"}, "completion", "character 3 is half of a surrogate pair"),
    (
        {"messages": [USER, {"role": "assistant", "content": "\udc00"}]},
        "messages",
        "content of message 2 is no Unicode",
    ),
    ({"question": "a", "answer": 4}, "answer", "must be text, not int"),
]


@pytest.mark.parametrize(("row", "field", "problem"), REFUSED)
def test_what_would_be_left_out_is_refused_by_name(row, field, problem):
    with pytest.raises(UserError, match=re.escape(problem)) as error:
        read_row(row, number=7, source="train.jsonl")
    assert (error.value.file, error.value.row, error.value.field) == ("train.jsonl", 7, field)


def test_text_that_only_looks_like_messages_is_text():
    for text in ('{"a": 1}', "[1, 2]", '{"role": "king"}', 'What is [{"role": "user", "content": "a"}]?'):
        (demonstration,) = read_row({"prompt": text, "completion": text}, number=1)
        assert (demonstration.prompt, demonstration.completion) == (text, text)


# -- unpaired preferences -----------------------------------------------------------------------------------------------

KTO = [
    {"prompt": "a", "completion": "b", "label": True},
    {"prompt": "a", "completion": "c", "label": False},
    {"prompt": "d", "completion": "e", "label": True},
]


@pytest.mark.parametrize("name", ["label", "kto_tag", "Label", "desirable"])
@pytest.mark.parametrize("spelled", [bool, str])
def test_answers_that_were_not_wanted_are_left_out_and_counted(name, spelled):
    rows = [{"prompt": r["prompt"], "completion": r["completion"], name: spelled(r["label"])} for r in KTO]
    left_out = Counter()
    found = list(read_rows(Dataset.from_list(rows), left_out=left_out))
    assert [[each.completion for each in row] for row in found] == [["b"], [], ["e"]]
    assert left_out == {"unwanted": 1}
    summary, tokenization = DataSummary(), Tokenization(tiny_tokenizer("plain"))
    kept = list(tokenized_rows(Dataset.from_list(rows), tokenization, summary=summary))
    assert [row.group.row for row in kept] == [0, 2]
    assert (summary.rows, summary.demonstrations, summary.dropped) == (3, 2, {"labelled false": 1})


def test_a_label_in_some_rows_only_is_an_error():
    rows = [*KTO, {"prompt": "a", "completion": "f", "label": None}]
    with pytest.raises(UserError, match="row 4, field 'label': some rows say whether"):
        list(read_rows(Dataset.from_list(rows)))


def test_what_is_left_out_is_shown_and_logged(caplog):
    tokenization = Tokenization(tiny_tokenizer("plain"))
    assert inspect_dataset(Dataset.from_list(KTO), tokenization).summary.dropped == {"labelled false": 1}
    list(tokenized_prompts(Dataset.from_list(KTO), tokenization, source="kto"))
    assert "kto: left out 1 of 3: labelled false" in caplog.text


def test_a_column_that_the_user_names_is_no_label():
    rows = [{"text": "Is it?", "label": "True"}, {"text": "Is it not?", "label": "False"}]
    found = list(read_rows(Dataset.from_list(rows), columns=Columns("text", "label")))
    assert [[each.completion for each in row] for row in found] == [["True"], ["False"]]
    (found,) = read_row({"tools": "a hammer", "use": "nails"}, number=1, columns=Columns("tools", "use"))
    assert found.prompt == "a hammer"


def test_a_label_of_a_pair_means_another():
    (found,) = read_row({"prompt": "a", "chosen": "b", "rejected": "c", "label": 0}, number=1)
    assert found.completion == "b"


# -- columns that the user names ------------------------------------------------------------------------------------------

NAMED = [
    ({"query": "2 + 2?", "response": "4"}, Columns("query", "response"), "2 + 2?"),
    ({"q": [USER], "completion": "4"}, Columns("q"), [USER]),
    ({"prompt": "x", "q": "2 + 2?", "answer": "4", "completion": "y"}, Columns("q", "answer"), "2 + 2?"),
    ({"prompt": "x", "completion": "y", "messages": [USER, ASSISTANT]}, Columns(messages="messages"), [USER]),
    ({"prompt": "x", "completion": "y", "chat": [HUMAN, GPT]}, Columns(messages="chat"), [USER]),
    ({"system_prompt": "Be brief.", "q": "2 + 2?", "r": "4"}, Columns("q", "r"), [SYSTEM, USER]),
    ({"question": "2 + 2?", "answer": "4", "context": "c"}, Columns("question", "answer"), "2 + 2?"),
]


@pytest.mark.parametrize(("row", "columns", "prompt"), NAMED)
def test_named_columns_are_read_whatever_others_there_are(row, columns, prompt):
    ((demonstration,),) = read_rows(Dataset.from_list([row]), columns=columns)
    assert (demonstration.prompt, demonstration.completion) == (prompt, "4")
    assert demonstration.fields == Dataset.from_list([row])[0], "a verifier sees the row as it is"


def test_an_error_names_the_column_as_the_data_call_it():
    with pytest.raises(UserError, match=r"^x, row 2, field 'response': is empty"):
        list(
            read_rows(
                Dataset.from_list([{"query": "a", "response": "b"}, {"query": "a", "response": " "}]),
                columns=Columns("query", "response"),
                source="x",
            )
        )
    with pytest.raises(
        UserError, match=r"field 'reply': there is no column 'reply', only 'query', 'response'.*--completion_column"
    ):
        detect_format(["query", "response"], given=Columns("query", "reply"))
    with pytest.raises(UserError, match=r"match no known format.*prompt \+ completion.*--prompt_column"):
        detect_format(["query", "response"])
    with pytest.raises(UserError, match="beside it"):
        Columns("a", messages="b")


# -- prompts alone --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "given", "alone"),
    [
        (["prompt"], None, True),
        (["prompt", "answer"], None, True),
        (["prompt", "question", "answer"], None, True),
        (["prompt", "completion"], None, False),
        (["prompt", "messages"], None, False),
        (["question", "answer"], None, False),
        (["question", "answer"], Columns("question"), True),
        (["question", "answer"], Columns("question", "answer"), False),
        (["prompt", "chat"], Columns(messages="chat"), False),
    ],
)
def test_which_data_hold_prompts_alone(columns, given, alone):
    assert holds_prompts_alone(Dataset.from_list([dict.fromkeys(columns, "a")]), given) == alone


def test_prompts_alone_have_system_messages_and_history_too():
    rows = [{"q": "Thanks.", "system": "Be brief.", "history": [["2 + 2?", "4"]]}]
    assert list(read_prompts(Dataset.from_list(rows), columns=Columns("q"))) == [[SYSTEM, USER, ASSISTANT, THANKS]]


PROMPTS = [
    ([{"prompt": 5}], 1, "must be text, not int"),
    ([{"prompt": "a"}, {"prompt": None}], 2, "is missing"),
    ([{"prompt": "a"}, {"prompt": "  "}], 2, "is empty"),
    ([{"prompt": "a"}, {"prompt": [USER]}], 2, "some rows hold text and some"),
    ([{"prompt": ["a", "b"]}], 1, "message 1 must be an object"),
    ([{"prompt": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}], 1, "must be text, not list"),
    ([{"prompt": [USER]}, {"prompt": [USER, {"role": "tool", "content": "a"}]}], 2, "has the role 'tool'"),
    ([{"prompt": [USER]}, {"prompt": [{"role": "user", "content": None}]}], 2, "is missing"),
    ([{"prompt": [USER, ASSISTANT]}], 1, "must be from the user"),
    ([{"prompt": str([USER])}], 1, "messages written as text"),
    ([{"prompt": "\ud800"}], 1, "no Unicode text"),
]


@pytest.mark.parametrize(("rows", "number", "problem"), PROMPTS)
@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("streaming", [False, True])
def test_prompts_alone_meet_the_same_checks(tmp_path, rows, number, problem, folder, streaming):
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = load_dataset(tmp_path if folder else path, streaming=streaming)
    with pytest.raises(UserError, match=re.escape(problem)) as error:
        list(tokenized_prompts(dataset, Tokenization(tiny_tokenizer("zephyr")), source="p"))
    assert (error.value.file, error.value.row, error.value.field) == (str(path), number, "prompt")
