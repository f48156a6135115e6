"""Files are read as they are written: every value, from a file as from a folder, and errors that name file and row."""

from __future__ import annotations

import codecs
import json
import re

import datasets
import pytest

from tutelage.data import load_dataset, read_rows
from tutelage.data.tables import table_of
from tutelage.errors import UserError

VALUES = [
    "42", "0042", "null", "true", "NaN", "1e5", '"q"', "[1]", "", " 0", "2020-01-01", "naïve 🦊", "\u2028", "a\x00b",
    42, 0, -1, 2**62, 2**63, 2**70, -(2**70), 1.0, 0.1, 1e300, True, False, None, [], {}, [1, "2"], ["3"], [[1], ["a"]],
    {"answer": "007", "v": 1}, {"answer": "42", "v": "x"}, {"v": None}, {"": {"": ""}}, [{"a": 1}, {"a": "1"}], "\ud83d",
]  # fmt: skip
"""Whatever JSON can hold, in one column."""


def same(found, wanted):
    """Equal in value and type, all the way down."""
    return json.dumps(found, sort_keys=True) == json.dumps(wanted, sort_keys=True)


def write(path, rows):
    path.parent.mkdir(exist_ok=True, parents=True)
    text = json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text)
    return path


@pytest.fixture(autouse=True)
def library_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("name", ["train.jsonl", "train.json"])
def test_json_values_keep_their_types(tmp_path, name, folder, streaming):
    rows = [{"prompt": "a", "completion": "b", "x": value} for value in VALUES]
    path = write(tmp_path / "data" / name, rows)
    found = list(load_dataset(path.parent if folder else path, streaming=streaming))
    assert all(same(row, wanted) for row, wanted in zip(found, rows, strict=True))
    assert [len(each) for each in read_rows(load_dataset(path))] == [1] * len(rows), "an unused column refuses nothing"


@pytest.mark.parametrize("pair", [(a, b) for a in VALUES[::3] for b in VALUES[1::3]])
def test_two_values_in_a_column_do_not_change_each_other(pair):
    assert same(list(table_of([{"x": value} for value in pair])), [{"x": value} for value in pair])


def test_a_table_can_be_used_as_any_other():
    table = table_of([{"x": value, "y": str(i)} for i, value in enumerate(VALUES)])
    assert same(table.select([3, 1])["x"][:], [VALUES[3], VALUES[1]])
    assert same([row["z"] for row in table.rename_columns({"x": "z"}).filter(lambda row: row["y"] != "0")], VALUES[1:])
    assert same([row["x"] for row in table.to_iterable_dataset().take(3)], VALUES[:3])


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("folder", [False, True])
def test_csv_is_text(tmp_path, folder, streaming):
    (tmp_path / "train.csv").write_text("prompt,completion,answer\nIs it?,NA,0042\nSo?,None,007\nNow?,null,1e5\n")
    found = list(load_dataset(tmp_path if folder else tmp_path / "train.csv", streaming=streaming))
    assert [row["completion"] for row in found] == ["NA", "None", "null"]
    assert [row["answer"] for row in found] == ["0042", "007", "1e5"]


@pytest.mark.parametrize("name", ["data.jsonl", "data.json", "lines.json", "data.csv"])
def test_a_byte_order_mark_is_none_of_the_text(tmp_path, name):
    path = tmp_path / name
    content = {
        "data.json": b'\n[{"prompt": "a", "completion": "b"}]\n',
        "data.csv": b"prompt,completion\na,b\n",
    }.get(name, b'{"prompt": "a", "completion": "b"}\n')
    path.write_bytes(codecs.BOM_UTF8 + content)
    assert list(load_dataset(path)) == [{"prompt": "a", "completion": "b"}]


GOOD = '{"prompt": "a", "completion": "b"}'
BROKEN = [
    ("a.jsonl", GOOD + '\n{"a": 1, "b": 2, "a": 3}\n', 2, "line 2 cannot be read: the name 'a' stands twice"),
    ("a.jsonl", GOOD + "\n" + '{"a": ' + "9" * 5000 + "}\n", 2, "line 2 cannot be read: Exceeds the limit"),
    ("a.jsonl", GOOD + '\n{"a": ' + "[" * 200_000 + "\n", 2, "line 2 nests lists or objects too deeply"),
    ("a.jsonl", GOOD + "\n" + GOOD + GOOD + "\n", 2, "line 2 is not valid JSON: Extra data at column 35"),
    ("a.json", f"[{GOOD},\n\n{GOOD},\n {{'prompt': 1}}]", 3, "line 4 is not valid JSON: .* at column 3"),
    ("a.json", f"[{GOOD},\n{GOOD}\n{GOOD}]", 2, "line 3: the item is followed neither by ',' nor by ']'"),
    ("a.json", f"[{GOOD},\n{GOOD},\n]", 3, "line 3 is not valid JSON"),
    ("a.json", f"[{GOOD},\n[{GOOD}]]", 2, "the item is valid JSON but not an object: it is a list"),
    ("a.json", f"[{GOOD}\n", 1, "the item is followed neither"),
    ("a.json", f"[{GOOD}] x", None, "something follows the list"),
    ("a.json", '{\n "prompt": "a"\n}', 1, "line 1 is not valid JSON"),
    ("a.csv", "a,b,a\n1,2,3\n", None, "the header has the column 'a' twice"),
]


@pytest.mark.parametrize(("name", "content", "row", "problem"), BROKEN)
@pytest.mark.parametrize("streaming", [False, True])
def test_an_error_names_file_and_row(tmp_path, name, content, row, problem, streaming):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(UserError, match=problem) as error:
        list(load_dataset(path, streaming=streaming))
    assert (error.value.file, error.value.row) == (str(path), row)


def test_text_in_another_encoding(tmp_path):
    for name, row in (("a.jsonl", 2), ("a.csv", None), ("a.json", None)):
        path = tmp_path / name
        text = {"a.csv": "prompt,completion\na,é\n", "a.json": f'[{GOOD},\n{{"prompt": "é"}}]'}.get(
            name, GOOD + '\n{"x": "é"}\n'
        )
        path.write_bytes(text.encode("latin-1"))
        with pytest.raises(UserError, match=r"line 2 is not UTF-8 text: .*Save the file as UTF-8") as error:
            load_dataset(path)
        assert error.value.row == row


# -- rows of several files, and parts of files ------------------------------------------------------------------------------


def good(count):
    return [{"prompt": str(i), "completion": "b"} for i in range(count)]


@pytest.mark.parametrize("streaming", [False, True])
def test_files_of_a_folder_are_read_one_after_the_other(tmp_path, streaming):
    write(tmp_path / "a.jsonl", [{**row, "id": 1} for row in good(2)])
    write(tmp_path / "b.jsonl", [{**row, "id": "k", "extra": [1, "2"]} for row in good(1)])
    (tmp_path / "c.csv").write_text("prompt,completion\n7,NA\n")
    found = list(load_dataset(tmp_path, streaming=streaming))
    assert [(row["prompt"], row["completion"], row.get("id")) for row in found] == [
        ("0", "b", 1), ("1", "b", 1), ("0", "b", "k"), ("7", "NA", None),
    ]  # fmt: skip


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("bad", [{"prompt": 5, "completion": "b"}, {"prompt": "a", "completion": None}, {}])
def test_the_file_of_a_folder_and_the_row_in_it_are_named(tmp_path, bad, streaming):
    write(tmp_path / "a.jsonl", good(3))
    path = write(tmp_path / "b.jsonl", [*good(1), bad])
    write(tmp_path / "c.jsonl", good(2))
    with pytest.raises(UserError) as error:
        list(read_rows(load_dataset(tmp_path, streaming=streaming), source="folder"))
    assert (error.value.file, error.value.row) == (str(path), 2)


@pytest.mark.parametrize(("split", "row"), [("train[50%:]", 8), ("train[7:]", 8), ("train[6:7]+train[7:]", 8)])
def test_the_row_of_the_file_is_named_where_a_part_is_read(tmp_path, split, row):
    path = write(tmp_path / "a.jsonl", [*good(7), {"prompt": "", "completion": "b"}, *good(2)])
    with pytest.raises(UserError, match="field 'prompt': is empty") as error:
        list(read_rows(load_dataset(path, split=split), source=str(path)))
    assert (error.value.file, error.value.row) == (str(path), row)


def test_parts_of_several_splits(tmp_path):
    write(tmp_path / "train.jsonl", good(4))
    path = write(tmp_path / "test.jsonl", [*good(2), {"prompt": "x", "completion": ""}])
    dataset = load_dataset(tmp_path, split="train[:1]+test[1:]")
    assert [row["prompt"] for row in dataset] == ["0", "1", "x"]
    with pytest.raises(UserError) as error:
        list(read_rows(dataset))
    assert (error.value.file, error.value.row) == (str(path), 3)
    for split in ("nothing", "train+nothing", "train[", "train[a:]"):
        with pytest.raises(UserError, match=re.escape(f"there is no split '{split}'")):
            load_dataset(tmp_path, split=split)


def test_a_folder_of_several_types(tmp_path):
    write(tmp_path / "a.jsonl", good(1))
    datasets.Dataset.from_list(good(1)).to_parquet(tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"files of several types: \.jsonl, \.parquet"):
        load_dataset(tmp_path)


def test_parquet_files_whose_types_differ(tmp_path):
    datasets.Dataset.from_list([{**row, "id": 1} for row in good(1)]).to_parquet(tmp_path / "a.parquet")
    datasets.Dataset.from_list([{**row, "id": "k"} for row in good(1)]).to_parquet(tmp_path / "b.parquet")
    with pytest.raises(UserError):
        list(load_dataset(tmp_path))


def test_a_row_that_a_library_cannot_read():
    def rows():
        yield {"prompt": "a", "completion": "b"}
        raise datasets.table.CastError("no", table_column_names=["x"], requested_column_names=["y"])

    with pytest.raises(UserError, match=r"^x, row 2: the row cannot be read: CastError"):
        list(read_rows(datasets.IterableDataset.from_generator(rows), source="x"))
