"""JSON files hold what every reader takes."""

import json
import math

from tutelage.files import read_json, read_sealed, write_json, write_json_lines, write_sealed

BROKEN = {"a": math.nan, "b": [1.5, -math.inf, {"c": (math.inf, "NaN")}], "d": 2}
WRITTEN = {"a": None, "b": [1.5, None, {"c": [None, "NaN"]}], "d": 2}


def refuse(name):
    raise AssertionError(f"{name} is no JSON")


def test_no_file_holds_a_number_that_json_does_not_know(tmp_path):
    write_json(tmp_path / "one.json", BROKEN)
    write_json_lines(tmp_path / "lines.jsonl", [BROKEN, BROKEN])
    write_sealed(tmp_path / "sealed.json", BROKEN)
    texts = [(tmp_path / "one.json").read_text(), *(tmp_path / "lines.jsonl").read_text().splitlines()]
    assert [json.loads(text, parse_constant=refuse) for text in texts] == [WRITTEN] * 3
    json.loads((tmp_path / "sealed.json").read_text(), parse_constant=refuse)
    assert read_json(tmp_path / "one.json") == read_sealed(tmp_path / "sealed.json") == WRITTEN
