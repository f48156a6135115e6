"""A world in plain English, for real language models: words in an order without two of one kind side by side."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

__all__ = ["KINDS", "english_rows", "is_arranged", "judge"]

KINDS = {
    "animal": ("cat", "dog", "horse", "sheep"),
    "color": ("red", "blue", "green", "black"),
    "fruit": ("apple", "lemon", "grape", "peach"),
    "tool": ("hammer", "saw", "drill", "axe"),
}
_KIND_OF = {word: kind for kind, words in KINDS.items() for word in words}
_ASKED = 6


def english_rows(count: int, seed: int) -> list[dict[str, str]]:
    """So many rows of ``prompt`` and ``completion``, no two with the same words in the same order.

    A prompt shows six words of four kinds, of which some of one kind stand side by side; there are many right answers.
    """
    rng, rows = random.Random(f"english/{seed}"), {}
    while len(rows) < count:
        asked = rng.sample(sorted(_KIND_OF), _ASKED)
        orders = (rng.sample(asked, _ASKED) for _ in range(200))
        answer = next((order for order in orders if is_arranged(order)), None)
        if answer is not None and not is_arranged(asked):
            prompt = f"Words: {' '.join(asked)}\nNo two of a kind side by side:"
            rows[prompt] = {"prompt": prompt, "completion": f" {' '.join(answer)}"}
    return list(rows.values())


def is_arranged(words: Sequence[str]) -> bool:
    """Whether no two neighbors are of one kind.

    >>> is_arranged(["cat", "red", "dog"]), is_arranged(["cat", "dog", "red"])
    (True, False)
    """
    return all(_KIND_OF.get(a) != _KIND_OF.get(b) for a, b in pairwise(words))


def judge(text: str, row: Mapping[str, Any]) -> float:
    """A verifier: 1 where the answer holds the words of the prompt, each once, in a right order.

    >>> judge(" cat red dog", {"prompt": "Words: cat dog red\\nNo two of a kind side by side:"})
    1.0
    """
    asked = str(row["prompt"]).split("\n")[0].removeprefix("Words: ").split()
    return float(sorted(text.split()) == sorted(asked) and is_arranged(text.split()))
