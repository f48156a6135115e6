"""Arrange six symbols so that no two of a color stand side by side: many right answers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from tutelage.lab.vocabulary import SYMBOLS
from tutelage.lab.worlds.task import Words, generator

__all__ = ["Arrange"]

_LENGTH, _COLORS, _MOST_OF_A_COLOR = 6, 4, 3


class Arrange:
    """Six distinct symbols of 16, which have four hidden colors, four symbols each; at most three of a color.

    Args:
        seed: of the colors.
    """

    name = "arrange"

    def __init__(self, seed: int):
        colors = generator(self.name, "colors", seed).permutation(np.arange(len(SYMBOLS)) % _COLORS)
        self.colors = dict(zip(SYMBOLS, colors.tolist(), strict=True))

    def content(self, rng: np.random.Generator) -> Words:
        """See ``Task``."""
        while True:
            chosen = tuple(SYMBOLS[index] for index in rng.permutation(len(SYMBOLS))[:_LENGTH])
            colors = [self.colors[symbol] for symbol in chosen]
            if max(colors.count(color) for color in colors) <= _MOST_OF_A_COLOR:
                return chosen

    def answer(self, content: Words, rng: np.random.Generator) -> Words:
        """A right order, uniformly drawn."""
        return self._order(content, rng, right=True)

    def mistake(self, content: Words, rng: np.random.Generator) -> Words:
        """An order with equal colors side by side; where there is none, one with a symbol twice."""
        if len({self.colors[symbol] for symbol in content}) == len(content):
            return (*content[:-1], content[0])
        return self._order(content, rng, right=False)

    def judge(self, content: Words, answer: Sequence[str]) -> float:
        """1 if the answer has the prompt's symbols, each once, and no equal colors side by side."""
        if sorted(answer) != sorted(content):
            return 0.0
        return float(all(self.colors[a] != self.colors[b] for a, b in pairwise(answer)))

    def _order(self, content: Words, rng: np.random.Generator, *, right: bool) -> Words:
        while True:
            order = tuple(content[index] for index in rng.permutation(len(content)))
            if (self.judge(content, order) == 1) == right:
                return order
