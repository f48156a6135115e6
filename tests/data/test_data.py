"""Loading and checking demonstrations, and the look at them before training."""

from __future__ import annotations

import gzip
import io
import json
import re
from pathlib import Path

import datasets
import huggingface_hub
import pytest
from rich.console import Console

from tutelage.data import (
    Tokenization,
    detect_format,
    inspect_dataset,
    is_conversational,
    load_dataset,
    print_inspection,
    read_row,
    read_rows,
    tokenize_dataset,
)
from tutelage.data.inspection import Lengths
from tutelage.errors import UserError
from tutelage.testing.tokenizers import tiny_tokenizer

SHARED_DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "2 + 2?"}
ASSISTANT = {"role": "assistant", "content": "4"}
WRONG = {"role": "assistant", "content": "5"}
THANKS = {"role": "user", "content": "Thanks."}
WELCOME = {"role": "assistant", "content": "Welcome."}

ROWS = [{"prompt": "2 + 2 =", "completion": " 4"}, {"prompt": "On which day?\n", "completion": "2020-01-01"}]


@pytest.fixture(autouse=True)
def library_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


# -- formats ----------------------------------------------------------------------------------------------------------

FORMATS = {
    "text": ({"prompt": "2 + 2 =", "completion": " 4"}, "2 + 2 =", " 4", None),
    "messages in prompt, text": ({"prompt": [SYSTEM, USER], "completion": "4"}, [SYSTEM, USER], "4", None),
    "messages in both": ({"prompt": [USER], "completion": [ASSISTANT]}, [USER], "4", None),
    "text prompt, message completion": ({"prompt": "2 + 2?", "completion": [ASSISTANT]}, [USER], "4", None),
    "messages": (
        {"messages": [USER, ASSISTANT, THANKS, WELCOME]},
        [USER, ASSISTANT, THANKS],
        "Welcome.",
        None,
    ),
    "SPIN": ({"real": [USER, ASSISTANT], "generated": [USER, WRONG]}, [USER], "4", None),
    "Alpaca": ({"instruction": "Add.", "input": "2, 2", "output": "4"}, "Add.\n\n2, 2\n\n", "4", None),
    "Alpaca, empty input": ({"instruction": "Add.", "input": "", "output": "4"}, "Add.\n\n", "4", None),
    "Alpaca, no input": ({"instruction": "Add.", "output": "4"}, "Add.\n\n", "4", None),
    "pair, text": ({"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}, "2 + 2 =", " 4", " 5"),
    "pair, last turns": ({"prompt": [USER], "chosen": [ASSISTANT], "rejected": [WRONG]}, [USER], "4", "5"),
    "pair, whole dialogues": (
        {"prompt": [SYSTEM, USER], "chosen": [SYSTEM, USER, ASSISTANT], "rejected": [SYSTEM, USER, WRONG]},
        [SYSTEM, USER],
        "4",
        "5",
    ),
    "pair, text prompt, whole dialogues": (
        {"prompt": "2 + 2?", "chosen": [USER, ASSISTANT], "rejected": [USER, WRONG], "messages": [USER, ASSISTANT]},
        [USER],
        "4",
        "5",
    ),
    "dialogues in messages": ({"chosen": [USER, ASSISTANT], "rejected": [USER, WRONG]}, [USER], "4", "5"),
    "dialogues in text": (
        {
            "chosen": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Sum?\n\nAssistant: 4",
            "rejected": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Sum?\n\nAssistant: 5",
        },
        "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Sum?\n\nAssistant:",
        " 4",
        " 5",
    ),
    "dialogues whose prompts differ": (
        {"chosen": "\n\nHuman: Sum?\n\nAssistant: 4", "rejected": "\n\nHuman: Product?\n\nAssistant: 5"},
        "\n\nHuman: Sum?\n\nAssistant:",
        " 4",
        None,
    ),
    "dialogues whose rejected turn is empty": (
        {"chosen": "\n\nHuman: Sum?\n\nAssistant: 4", "rejected": "\n\nHuman: Sum?\n\nAssistant: "},
        "\n\nHuman: Sum?\n\nAssistant:",
        " 4",
        None,
    ),
    "pair of equals": ({"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 4"}, "2 + 2 =", " 4", None),
}


@pytest.mark.parametrize(("row", "prompt", "completion", "rejected"), FORMATS.values(), ids=FORMATS)
def test_every_format_is_read(row, prompt, completion, rejected):
    (demonstration,) = read_row({**row, "answer": "4"}, number=3)
    assert (demonstration.prompt, demonstration.completion, demonstration.rejected) == (prompt, completion, rejected)
    assert (demonstration.row, demonstration.number) == (2, 3)
    assert demonstration.fields == {**row, "answer": "4"}, "a verifier sees the whole row"


def test_all_turns_become_demonstrations_with_ids_of_their_own():
    row = {"messages": [SYSTEM, USER, ASSISTANT, THANKS, WELCOME]}
    first, second = read_row(row, number=2, turns="all")
    assert (first.prompt, first.completion) == ([SYSTEM, USER], "4")
    assert (second.prompt, second.completion) == ([SYSTEM, USER, ASSISTANT, THANKS], "Welcome.")
    neighbors = [turn.row for number in (1, 3) for turn in read_row(row, number=number, turns="all")]
    assert len({first.row, second.row, *neighbors}) == 6


def test_a_dialogue_whose_preferred_turn_is_empty_is_left_out():
    row = {"chosen": "\n\nHuman: Hi\n\nAssistant: ", "rejected": "\n\nHuman: Hi\n\nAssistant: Hello"}
    assert read_row(row, number=1) == []


def test_extra_keys_of_messages_are_not_part_of_the_conversation():
    (demonstration,) = read_row({"messages": [{**USER, "name": None}, ASSISTANT]}, number=1)
    assert demonstration.prompt == [USER]


@pytest.mark.parametrize(
    ("row", "field", "problem"),
    [
        ({"prompt": " \n", "completion": "4"}, "prompt", "is empty"),
        ({"prompt": "2", "completion": " \n"}, "completion", "is empty"),
        ({"prompt": "2", "completion": None}, "completion", "is missing"),
        ({"prompt": "2", "completion": 4}, "completion", "must be text, not int"),
        ({"prompt": [], "completion": "4"}, "prompt", "is empty"),
        ({"prompt": [USER, ASSISTANT], "completion": "4"}, "prompt", "must be from the user"),
        ({"prompt": [SYSTEM], "completion": "4"}, "prompt", "must be from the user"),
        ({"prompt": [USER], "completion": [USER, ASSISTANT]}, "completion", "one assistant message"),
        ({"messages": "2 + 2?"}, "messages", "a list of messages, not str"),
        ({"messages": ["2 + 2?"]}, "messages", "message 1 must be an object"),
        (
            {"messages": [USER, {"role": "assistant", "content": ["4"]}]},
            "messages",
            "content of message 2 must be text",
        ),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, "messages", "content of message 2 is empty"),
        (
            {"messages": [USER, {"role": "tool", "content": "4"}, ASSISTANT]},
            "messages",
            "message 2 has the role 'tool'",
        ),
        ({"messages": [USER, {"content": "4"}]}, "messages", "message 2 has the role None"),
        ({"messages": [ASSISTANT]}, "messages", "message 1 is from the assistant"),
        ({"messages": [USER, USER, ASSISTANT]}, "messages", "message 2 is from the user"),
        ({"messages": [USER, SYSTEM, ASSISTANT]}, "messages", "message 2 is from the system"),
        ({"messages": [SYSTEM, SYSTEM, USER, ASSISTANT]}, "messages", "message 2 is from the system"),
        ({"messages": [USER]}, "messages", "no assistant turn"),
        ({"messages": [USER, ASSISTANT, THANKS]}, "messages", "last message is not from the assistant"),
        ({"real": [USER], "generated": [USER]}, "real", "no assistant turn"),
        ({"instruction": "", "output": "4"}, "instruction", "is empty"),
        ({"instruction": "Add.", "output": ""}, "output", "is empty"),
        ({"instruction": "Add.", "input": 0, "output": "4"}, "input", "must be text, not int"),
        ({"prompt": "2", "chosen": "4", "rejected": ""}, "rejected", "is empty"),
        ({"prompt": [THANKS], "chosen": [USER, ASSISTANT], "rejected": [WRONG]}, "chosen", "is not what comes first"),
        ({"prompt": "Hi", "chosen": [ASSISTANT], "rejected": [USER, WRONG]}, "rejected", "is not what comes first"),
        ({"chosen": "Hello", "rejected": "\n\nHuman: Hi\n\nAssistant: a"}, "chosen", "no assistant turn"),
        ({"chosen": "\n\nAssistant: a", "rejected": "\n\nHuman: Hi\n\nAssistant: a"}, "chosen", "no prompt"),
        (
            {"chosen": "\n\nHuman: Hi\n\nAssistant: a\n\nHuman: b", "rejected": "\n\nHuman: Hi\n\nAssistant: a"},
            "chosen",
            "last turn is not from the assistant",
        ),
    ],
)
def test_a_bad_row_is_an_error_that_names_file_row_and_field(row, field, problem):
    with pytest.raises(UserError, match=re.escape(problem)) as error:
        read_row(row, number=7, source="train.jsonl")
    assert str(error.value).startswith(f"train.jsonl, row 7, field '{field}': ")


def test_unknown_columns_are_named_with_what_would_do():
    with pytest.raises(UserError, match=r"'query', 'reply' match no known format.*prompt \+ completion"):
        detect_format(["query", "reply"], source="some.jsonl")


def test_text_and_messages_in_one_data_set_are_an_error():
    dataset = datasets.IterableDataset.from_generator(
        lambda: iter([{"prompt": "2", "completion": "4"}, {"prompt": [USER], "completion": "4"}])
    )
    with pytest.raises(UserError, match="row 2: some rows hold text"):
        list(read_rows(dataset))


def test_is_conversational():
    assert not is_conversational(datasets.Dataset.from_list(ROWS))
    assert is_conversational(datasets.Dataset.from_list([{"messages": [USER, ASSISTANT]}]))


# -- loading ----------------------------------------------------------------------------------------------------------


def write(path: Path, rows: list[dict]) -> Path:
    """Write ``rows`` in the format that the name of ``path`` says."""
    dataset = datasets.Dataset.from_list(rows)
    content = io.BytesIO()
    match path.name.removesuffix(".gz").rpartition(".")[2]:
        case "jsonl":
            content.write("".join(json.dumps(row) + "\n" for row in rows).encode())
        case "json":
            content.write(json.dumps(rows, indent=2).encode())
        case "csv":
            dataset.to_csv(content)
        case "parquet":
            dataset.to_parquet(content)
    path.write_bytes(gzip.compress(content.getvalue()) if path.suffix == ".gz" else content.getvalue())
    return path


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("zipped", ["", ".gz"])
@pytest.mark.parametrize("extension", ["jsonl", "json", "csv", "parquet"])
def test_files_are_read_as_they_were_written(tmp_path, extension, zipped, streaming):
    path = write(tmp_path / f"data.{extension}{zipped}", ROWS)
    dataset = load_dataset(path, streaming=streaming)
    assert list(dataset) == ROWS  # the completion that looks like a date is still text
    assert isinstance(dataset, datasets.IterableDataset) == streaming


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("extension", ["jsonl", "json", "parquet"])
def test_conversations_survive_files(tmp_path, extension, streaming):
    rows = [{"messages": [SYSTEM, USER, ASSISTANT]}, {"messages": [USER, ASSISTANT]}]
    dataset = load_dataset(write(tmp_path / f"data.{extension}", rows), streaming=streaming)
    prompts = [demonstration.prompt for (demonstration,) in read_rows(dataset)]
    assert prompts == [[SYSTEM, USER], [USER]]


def test_json_lines_may_differ_in_columns(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(
        '{"prompt": "a", "completion": "b", "level": 1}\n{"prompt": "a", "completion": "d", "more": true}\n'
    )
    assert [row["level"] for row in load_dataset(path)] == [1, None]


def test_csv_keeps_numbers_and_na_as_text(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text('prompt,completion\n1,007\n"two\nlines",NA\n')
    assert list(load_dataset(path)) == [
        {"prompt": "1", "completion": "007"},
        {"prompt": "two\nlines", "completion": "NA"},
    ]


def test_folders(tmp_path):
    (tmp_path / "files").mkdir()
    write(tmp_path / "files" / "train.jsonl", ROWS[:1])
    write(tmp_path / "files" / "test.jsonl", ROWS)
    saved = datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)})
    saved.save_to_disk(tmp_path / "saved")
    for streaming in (False, True):
        assert list(load_dataset(tmp_path / "files", streaming=streaming)) == ROWS[:1]
        assert len(list(load_dataset(tmp_path / "files", split="test", streaming=streaming))) == 2
        assert list(load_dataset(tmp_path / "saved", streaming=streaming)) == ROWS
    for folder in ("files", "saved"):
        with pytest.raises(UserError, match=f"{folder}: .*validation"):
            load_dataset(tmp_path / folder, split="validation")


def test_a_part_of_a_file(tmp_path):
    path = write(tmp_path / "data.jsonl", [{"prompt": str(i), "completion": "x"} for i in range(10)])
    assert [row["prompt"] for row in load_dataset(path, split="train[8:]")] == ["8", "9"]
    assert len(load_dataset(path, split="train[:20%]+train[90%:]")) == 3


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("data.jsonl", b'{"prompt": "a"}\n{"prompt": \n', r"row 2: line 2 is not valid JSON: .* column"),
        ("data.jsonl", b'{"prompt": "a"}\n["a"]\n', r"row 2: line 2 is valid JSON but not an object: it is a list"),
        ("data.jsonl", b'{"prompt": "a"}\n\n{"prompt": "b"}\n', r"row 2: line 2 is empty"),
        ("data.jsonl", b'{"prompt": "\xff\xfe"}\n', r"row 1: line 1 is not UTF-8 text"),
        ("data.jsonl", b"\n", r"the dataset is empty"),
        ("data.json", b'[\n{"prompt": "a"},\n{"prompt"}]', r"line 3 is not valid JSON"),
        ("data.json", b'[{"prompt": "a"}, 3]', r"row 2: the item is valid JSON but not an object"),
        ("data.json", b"[]", r"the dataset is empty"),
        ("data.csv", b"prompt,completion\na,b\nc\n", r"row 2: the row that ends on line 3 has not 2 cells"),
        ("data.csv", b"prompt,completion\na,b,c\n", r"row 1: .* has not 2 cells"),
        ("data.csv", b'prompt,completion\na,"b\n', r"row 1: .* not valid CSV"),
        ("data.csv", b"prompt,completion\n", r"the dataset is empty"),
        ("data.parquet", b"PAR1", r"cannot be read"),
        ("data.jsonl.gz", b"no gzip", r"cannot be read: BadGzipFile"),
        ("data.jsonl.gz", gzip.compress(b'{"prompt": "a"}\n' * 9, mtime=0)[:-12], r"cannot be read: EOFError"),
        ("data.txt", b"hello", r"unknown file type; supported are \.json"),
    ],
)
def test_a_broken_file_is_one_error_that_names_the_file(tmp_path, name, content, problem):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"^{re.escape(str(path))}(: |, ).*({problem})"):
        load_dataset(path)


def test_a_broken_line_raises_when_streaming_reaches_it(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\nnonsense\n')
    with pytest.raises(UserError, match="row 2: line 2 is not valid JSON"):
        list(load_dataset(path, streaming=True))


def test_a_broken_line_in_a_folder_is_named(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"prompt": "a"}\nnonsense\n')
    with pytest.raises(UserError, match=r"train\.jsonl, row 2: line 2"):
        load_dataset(tmp_path)


@pytest.mark.parametrize("name", ["missing.jsonl", "missing.csv.gz", "./missing", "/no/such/folder", "a/b/c"])
def test_a_missing_path_is_no_hub_name(name):
    with pytest.raises(UserError, match=f"^{name}: this file or folder does not exist"):
        load_dataset(name)


def test_a_hub_data_set_that_cannot_be_loaded():
    with pytest.raises(UserError, match=r"^nobody/nothing: there is no such file or folder, and from the hub"):
        load_dataset("nobody/nothing")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_missing_split_of_a_file(tmp_path, streaming):
    path = write(tmp_path / "data.jsonl", ROWS)
    with pytest.raises(UserError, match="'test'"):
        load_dataset(path, split="test", streaming=streaming)


# -- real data --------------------------------------------------------------------------------------------------------


def shared(name: str) -> Path:
    path = SHARED_DATA / name
    if not path.exists():
        pytest.skip(f"{path} is not here")
    return path


def test_real_preference_dialogues():
    rows = list(read_rows(load_dataset(shared("hh_harmless_pairs.jsonl.gz"))))
    demonstrations = [demonstration for found in rows for demonstration in found]
    assert len(rows) == 1500
    assert len(demonstrations) == 1496  # in four rows the preferred answer is silence
    assert sum(demonstration.rejected is not None for demonstration in demonstrations) == 1495  # one has two prompts
    assert all(demonstration.prompt.endswith("\n\nAssistant:") for demonstration in demonstrations)


def test_real_questions_and_answers():
    path = shared("gsm8k_demonstrations.jsonl.gz")
    found = [demonstration for (demonstration,) in read_rows(load_dataset(path, split="train[:100]"))]
    assert all("####" in demonstration.completion for demonstration in found)
    assert [found[0].prompt, found[0].completion] == [found[0].fields[name] for name in ("question", "answer")]


# -- inspection -------------------------------------------------------------------------------------------------------


def test_lengths():
    lengths = Lengths.of([1, *range(1, 100)], limit=50)
    assert (lengths.minimum, lengths.median, lengths.p95, lengths.maximum) == (1, 49, 94, 99)
    assert lengths.mean == pytest.approx(49.51)
    assert sum(count for _, _, count in lengths.histogram) == 100
    assert lengths.histogram[0] == (1, 10, 11)
    assert Lengths.of([7], limit=9).histogram == ((7, 7, 1),)


def inspection_of(rows: list[dict], **limits):
    dataset = datasets.Dataset.from_list(rows)
    tokenization = Tokenization(tiny_tokenizer("zephyr"), **limits)
    return inspect_dataset(dataset, tokenization, source="train.jsonl"), dataset, tokenization


def test_inspection_counts_what_training_would_do():
    rows = [
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": "a" * 30, "chosen": "b", "rejected": "c"},
        {"prompt": "a", "chosen": "d" * 30, "rejected": "c"},
    ]
    inspection, dataset, tokenization = inspection_of(
        rows, max_prompt_length=10, max_completion_length=10, on_long_prompt="drop"
    )
    summary = inspection.summary
    assert (summary.rows, summary.demonstrations, summary.pairs, summary.truncated) == (3, 2, 2, 1)
    assert summary.dropped == {"prompt too long": 1}
    assert len(tokenize_dataset(dataset, tokenization)) == summary.demonstrations
    assert inspection.prompts.maximum == 31  # BOS and 30 letters: before anything is dropped
    assert inspection.completions.maximum == 31  # 30 letters and EOS: before anything is cut
    assert [example.number for example in inspection.examples] == [1, 3]


def page(inspection) -> str:
    console = Console(file=io.StringIO(), width=200, force_terminal=True, color_system="standard")
    print_inspection(inspection, console)
    return console.file.getvalue()


def test_the_page_shows_data_literally():
    inspection, *_ = inspection_of([{"prompt": "[bold]a[/bold] [/]", "completion": "\x1b[2J\u202eb"}])
    shown = page(inspection)
    assert "[bold]a[/bold] [/]" in shown
    assert r"\x1b[2J\u202eb" in shown
    assert "\x1b[2J" not in shown


def test_the_page_marks_special_tokens_and_cuts():
    finished, *_ = inspection_of([{"prompt": "a", "completion": "b"}])
    cut, *_ = inspection_of([{"prompt": "a", "completion": "b" * 30}], max_completion_length=5)
    assert "\x1b[1;7;36m<s>" in page(finished)
    assert "\x1b[1;7;32m</s>" in page(finished)
    assert "truncated here" not in page(finished)
    assert "truncated here" in page(cut)
    assert "</s>" not in page(cut)


def test_the_page_says_when_training_would_stop_at_long_prompts():
    rows = [{"prompt": "a" * 30, "completion": "b"}]
    assert "Training would stop" in page(inspection_of(rows, max_prompt_length=9)[0])
    assert "Training would stop" not in page(inspection_of(rows, max_prompt_length=9, on_long_prompt="drop")[0])
