"""Reverse five symbols: one right answer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tutelage.lab.vocabulary import SYMBOLS
from tutelage.lab.worlds.task import Words

__all__ = ["Reverse"]

_LENGTH = 5


class Reverse:
    """Five distinct symbols of 16 in reverse order. Nothing about it is hidden.

    Args:
        seed: not used: every seed has the same task and other rows.
    """

    name = "reverse"

    def __init__(self, seed: int):
        del seed

    def content(self, rng: np.random.Generator) -> Words:
        """See ``Task``."""
        return tuple(SYMBOLS[index] for index in rng.permutation(len(SYMBOLS))[:_LENGTH])

    def answer(self, content: Words, rng: np.random.Generator) -> Words:
        """The one right answer."""
        return content[::-1]

    def mistake(self, content: Words, rng: np.random.Generator) -> Words:
        """One symbol of the right answer replaced by another."""
        wrong = list(content[::-1])
        place = int(rng.integers(_LENGTH))
        others = [symbol for symbol in SYMBOLS if symbol != wrong[place]]
        wrong[place] = others[int(rng.integers(len(others)))]
        return tuple(wrong)

    def judge(self, content: Words, answer: Sequence[str]) -> float:
        """1 if it is the right answer."""
        return float(tuple(answer) == content[::-1])
