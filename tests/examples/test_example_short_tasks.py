"""The tasks of the examples: their demonstrations are right, and the judge knows wrong answers."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "short_tasks.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("short_tasks", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_demonstrations_are_right_and_prompts_differ(example):
    pytest.importorskip("reasoning_gym")
    for task in example.TASKS.values():
        rows = task.rows(24, seed=1)
        assert len({row["prompt"] for row in rows}) == 24
        assert all(example.judge(row["completion"], row) == 1 for row in rows)
        assert rows != task.rows(24, seed=2)


def test_an_arrangement_is_of_all_words_and_no_kind_stands_beside_itself(example):
    row = {"gym": "None", "prompt": "Words: cat dog red axe\nAnswer:"}
    assert example.judge(" cat red dog axe", row) == 1
    assert example.judge(" dog axe cat red", row) == 1
    assert example.judge(" cat dog red axe", row) == 0
    assert example.judge(" cat red dog", row) == 0
    assert example.judge(" cat red dog axe axe", row) == 0


def test_any_palindrome_of_the_letters_is_right(example):
    pytest.importorskip("reasoning_gym")
    row = example.TASKS["palindrome"].rows(1, seed=1)[0]
    letters = row["completion"].split()
    assert len(letters) > 3
    half = len(letters) // 2
    other = letters[1:half] + letters[:1] + letters[half : len(letters) - half]
    other += (letters[1:half] + letters[:1])[::-1]
    assert example.judge(" ".join(other), row) == 1
    assert example.judge(" ".join(letters[:-1]), row) == 0
